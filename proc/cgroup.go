package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hierarchy is where the calling process stands in one cgroup hierarchy.
type hierarchy struct {
	own string // absolute directory of our own cgroup, "" where none was found
	why string // why none was found
}

// findHierarchies reads /proc/self for the unified hierarchy and for the v1
// memory hierarchy.
func findHierarchies() (v2, v1mem hierarchy) {
	v2.why, v1mem.why = "no cgroup v2 file system is mounted", "no cgroup v1 memory controller is mounted"
	mounts, err := readWhole("/proc/self/mountinfo", 4<<20)
	if err != nil {
		v2.why = "cannot read /proc/self/mountinfo: " + err.Error()
		return v2, v1mem
	}
	groups, err := readWhole("/proc/self/cgroup", 1<<20)
	if err != nil {
		v2.why = "cannot read /proc/self/cgroup: " + err.Error()
		return v2, v1mem
	}
	for line := range bytes.Lines(mounts) {
		if !bytes.Contains(line, []byte("cgroup")) {
			continue
		}
		root, point, fstype, super, ok := parseMount(string(bytes.TrimSuffix(line, []byte("\n"))))
		switch {
		case !ok:
		case fstype == "cgroup2" && v2.own == "":
			v2 = resolve(root, point, ownPath(groups, ""))
		case fstype == "cgroup" && v1mem.own == "" && hasWord(super, "memory", ","):
			v1mem = resolve(root, point, ownPath(groups, "memory"))
		}
	}
	return v2, v1mem
}

// parseMount reads a line of mountinfo.
func parseMount(line string) (root, point, fstype, super string, ok bool) {
	left, right, found := strings.Cut(line, " - ")
	l, r := strings.Fields(left), strings.Fields(right)
	if !found || len(l) < 5 || len(r) < 3 {
		return "", "", "", "", false
	}
	return unescape(l[3]), unescape(l[4]), r[0], r[2], true
}

// unescape undoes the kernel's \ooo in mountinfo.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func hasWord(s, word, sep string) bool {
	for w := range strings.SplitSeq(s, sep) {
		if strings.TrimSpace(w) == word {
			return true
		}
	}
	return false
}

// ownPath finds the path for a controller ("" is v2) in /proc/self/cgroup.
func ownPath(groups []byte, controller string) string {
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		if controller == "" && f[0] == "0" && f[1] == "" || controller != "" && hasWord(f[1], controller, ",") {
			return f[2]
		}
	}
	return ""
}

// resolve turns a cgroup path into a directory, and checks that we are in it:
// in containers without a cgroup namespace the two may not fit.
func resolve(root, point, path string) hierarchy {
	if path == "" {
		return hierarchy{why: "our own cgroup is not named in /proc/self/cgroup"}
	}
	rel := path
	if root != "/" {
		r, ok := strings.CutPrefix(path, root)
		if !ok || r != "" && r[0] != '/' {
			return hierarchy{why: fmt.Sprintf("our own cgroup %s is outside the mount at %s", quote(path), quote(point))}
		}
		rel = r
	}
	dir := filepath.Join(point, rel)
	procs, err := readWhole(filepath.Join(dir, "cgroup.procs"), 16<<20)
	if err != nil {
		return hierarchy{why: fmt.Sprintf("cannot read our own cgroup %s: %v", quote(dir), err)}
	}
	self := strconv.Itoa(os.Getpid())
	for line := range bytes.Lines(procs) {
		if string(bytes.TrimSpace(line)) == self {
			return hierarchy{own: dir}
		}
	}
	return hierarchy{why: fmt.Sprintf("%s is not our own cgroup", quote(dir))}
}

// Names of our directories for an instance tag. They stand beside each other
// in our own cgroup. Runs with a memory limit have a parent of their own, so
// that only they pay for the memory controller.
func treeDirName(tag string) string   { return "remuda." + tag }
func memDirName(tag string) string    { return "remuda-mem." + tag }
func keeperDirName(tag string) string { return "remuda-keeper." + tag }

// groups is what a launcher has of cgroups.
type groups struct {
	own     string // our own v2 cgroup (its parent, if we were moved into our leaf)
	tree    string // parent directory of runs, "" where there is none
	treeWhy string
	mem     string // parent directory of runs with a memory limit, "" where there is none
	memV1   bool   // mem is in the v1 memory hierarchy and runs have a directory in tree as well
	memWhy  string
}

// setupGroups creates the directories for tag. With moveSelf the calling
// process may be moved into a leaf of its own cgroup, as v2's rule "no
// processes in inner nodes" wants before a controller can be enabled.
func setupGroups(tag string, moveSelf bool) groups {
	var g groups
	v2, v1 := findHierarchies()
	if v2.own == "" {
		g.treeWhy = v2.why
	} else {
		g.own = v2.own
		if filepath.Base(g.own) == keeperDirName(tag) {
			g.own = filepath.Dir(g.own)
		}
		g.tree, g.treeWhy = makeTree(g.own, tag)
	}
	g.memWhy = "no memory controller: neither in cgroup v2 nor v1"
	if g.tree != "" && hasController(g.own, "cgroup.controllers", "memory") {
		g.mem, g.memWhy = makeMemV2(g.own, tag, moveSelf)
	}
	if g.mem == "" && v1.own != "" {
		dir := filepath.Join(v1.own, treeDirName(tag))
		if err := mkdir(dir); err != nil {
			g.memWhy = fmt.Sprintf("cannot create %s: %v", dir, err)
		} else {
			g.mem, g.memV1, g.memWhy = dir, true, ""
		}
	}
	return g
}

// couldMakeTree says without making anything whether runs can have cgroups in
// own, and if not, why.
func couldMakeTree(own string) (dir, why string) {
	for _, path := range []string{own, filepath.Join(own, "cgroup.procs")} {
		if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); err != nil {
			return "", fmt.Sprintf("our own cgroup %s is not ours to write (%v)", own, err)
		}
	}
	if err := cloneIntoCgroup(); err != nil {
		return "", fmt.Sprintf("the kernel does not start processes in a cgroup (clone3: %v)", err)
	}
	return own, ""
}

func makeTree(own, tag string) (dir, why string) {
	if _, why := couldMakeTree(own); why != "" {
		return "", why
	}
	dir = filepath.Join(own, treeDirName(tag))
	if err := mkdir(dir); err != nil {
		return "", fmt.Sprintf("cannot create %s: %v", dir, err)
	}
	return dir, ""
}

func makeMemV2(own, tag string, moveSelf bool) (dir, why string) {
	if !hasController(own, "cgroup.subtree_control", "memory") {
		if err := enableMemory(own, tag, moveSelf); err != nil {
			return "", err.Error()
		}
	}
	dir = filepath.Join(own, memDirName(tag))
	if err := mkdir(dir); err != nil {
		return "", fmt.Sprintf("cannot create %s: %v", dir, err)
	}
	if err := writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+memory"); err != nil {
		_ = unix.Rmdir(dir)
		return "", fmt.Sprintf("cannot enable the memory controller in %s: %v", dir, err)
	}
	return dir, ""
}

func enableMemory(own, tag string, moveSelf bool) error {
	enable := func() error {
		if err := writeFile(filepath.Join(own, "cgroup.subtree_control"), "+memory"); err != nil {
			return fmt.Errorf("cannot enable the memory controller in %s: %w", own, err)
		}
		return nil
	}
	// The root of the hierarchy (no cgroup.type there) is exempt from the rule
	// that inner nodes hold no processes.
	if unix.Access(filepath.Join(own, "cgroup.type"), unix.F_OK) != nil {
		return enable()
	}
	if !moveSelf {
		return fmt.Errorf("the memory controller is not enabled in %s", own)
	}
	pids, err := readPids(filepath.Join(own, "cgroup.procs"), nil)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if pid != os.Getpid() {
			return fmt.Errorf("the memory controller cannot be enabled in %s: other processes are in it (under systemd, use Delegate=yes)", own)
		}
	}
	leaf := filepath.Join(own, keeperDirName(tag))
	if err := mkdir(leaf); err != nil {
		return fmt.Errorf("cannot create %s: %w", leaf, err)
	}
	self := strconv.Itoa(os.Getpid())
	if len(pids) > 0 {
		if err := writeFile(filepath.Join(leaf, "cgroup.procs"), self); err != nil {
			return fmt.Errorf("cannot move into %s: %w", leaf, err)
		}
	}
	if err := enable(); err != nil {
		if len(pids) > 0 {
			_ = writeFile(filepath.Join(own, "cgroup.procs"), self)
		}
		_ = unix.Rmdir(leaf)
		return err
	}
	return nil
}

func hasController(dir, file, name string) bool {
	b, err := readWhole(filepath.Join(dir, file), 64<<10)
	return err == nil && hasWord(strings.TrimSpace(string(b)), name, " ")
}

func mkdir(dir string) error {
	if err := unix.Mkdir(dir, 0o755); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// cloneArgs is struct clone_args of clone3(2), version 2.
type cloneArgs struct {
	flags, pidFD, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// cloneIntoCgroup asks whether clone3 with CLONE_INTO_CGROUP works here. The
// descriptor it names is never a cgroup, so that no process can come of it: a
// kernel that knows the flag says EBADF.
func cloneIntoCgroup() error {
	fd, err := openRetry("/proc", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	args := cloneArgs{flags: unix.CLONE_INTO_CGROUP, exitSignal: uint64(syscall.SIGCHLD), cgroup: uint64(fd)}
	_, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	runtime.KeepAlive(&args)
	if errno == unix.EBADF {
		return nil
	}
	return errno
}

// readPids appends the pids in a cgroup.procs or children file.
func readPids(path string, to []int) ([]int, error) {
	b, err := readWhole(path, 64<<20)
	if err != nil && len(b) == 0 {
		return to, err
	}
	n := 0
	for _, c := range b {
		switch {
		case '0' <= c && c <= '9':
			n = n*10 + int(c-'0')
		case n > 0: // 0 is a process of another pid namespace
			to = append(to, n)
			n = 0
		}
	}
	if n > 0 {
		to = append(to, n)
	}
	return to, nil
}

// populated reports whether a live process is in the cgroup or below it.
// A directory that is gone holds nothing.
func populated(dir string) (bool, error) {
	var buf [256]byte
	b, err := readSmall(dir+"/cgroup.events", buf[:])
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return !bytes.Contains(b, []byte("populated 0")), nil
}

func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) }

// groupMembers lists the pids in the cgroup and below it.
func groupMembers(dir string, to []int) ([]int, error) {
	to, err := readPids(dir+"/cgroup.procs", to)
	if gone(err) {
		return to, nil
	}
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // a threaded cgroup
		return to, err
	}
	for _, sub := range subdirs(dir) {
		if to, err = groupMembers(sub, to); err != nil {
			return to, err
		}
	}
	return to, nil
}

// subdirs lists directories in a cgroup directory. The link count tells
// cheaply that there are none, which is nearly always so.
func subdirs(dir string) []string {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil || st.Nlink == 2 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var subs []string
	for _, e := range entries {
		if e.IsDir() {
			subs = append(subs, filepath.Join(dir, e.Name()))
		}
	}
	return subs
}

// removeGroup removes the directory and the empty ones below it; it reports
// whether it is gone.
func removeGroup(dir string) bool {
	err := unix.Rmdir(dir)
	if err == unix.EBUSY || err == unix.ENOTEMPTY {
		for _, sub := range subdirs(dir) {
			removeGroup(sub)
		}
		err = unix.Rmdir(dir)
	}
	return err == nil || err == unix.ENOENT
}

// oomKills reads how many processes of the cgroup the kernel killed for want
// of memory.
func oomKills(dir string, v1 bool) int {
	file := "/memory.events"
	if v1 {
		file = "/memory.oom_control"
	}
	var buf [512]byte
	b, err := readSmall(dir+file, buf[:])
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		if v, ok := bytes.CutPrefix(line, []byte("oom_kill ")); ok {
			n, _ := atoi(bytes.TrimSpace(v))
			return n
		}
	}
	return 0
}
