package proc

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// OwnedTag is an instance tag that says whose runs it names: the calling
// process's. [SweepDead] with the same prefix, of at most 8 letters, clears
// them away when the process is gone.
func OwnedTag(prefix string) string {
	start := uint64(0)
	if id, err := Identify(os.Getpid()); err == nil {
		start = id.Start
	}
	return fmt.Sprintf("%s%d.%s.%s.%s", prefix, os.Getpid(), strconv.FormatUint(start, 36),
		strconv.FormatUint(pidNamespace(), 36), strconv.FormatUint(uint64(rand.Uint32()), 36))
}

// pidNamespace tells apart whom pids mean; 0 where it is not known.
func pidNamespace() uint64 {
	var st unix.Stat_t
	if unix.Stat("/proc/self/ns/pid", &st) != nil {
		return 0
	}
	return st.Ino
}

// OwnerDead reports whether tag is an OwnedTag with the prefix whose process is
// known to be gone.
func OwnerDead(tag, prefix string) bool {
	rest, ok := strings.CutPrefix(tag, prefix)
	f := strings.Split(rest, ".")
	if !ok || len(f) != 4 {
		return false
	}
	pid, err := strconv.Atoi(f[0])
	start, err2 := strconv.ParseUint(f[1], 36, 64)
	ns, err3 := strconv.ParseUint(f[2], 36, 64)
	if err != nil || err2 != nil || err3 != nil || pid <= 0 || start == 0 || ns == 0 || ns != pidNamespace() {
		return false
	}
	st, err := readStat(pid)
	switch {
	case errors.Is(err, os.ErrProcessDone):
		return true
	case err != nil:
		return false
	}
	return st.start != start || !st.live()
}

// SweepDead is [Sweep] for every tag of [OwnedTag] with the prefix whose process
// is gone without having cleared up. It looks in the calling process's own
// cgroup, and where that gives runs none at the processes of the machine. It
// returns how many processes it killed.
func SweepDead(ctx context.Context, prefix string) (killed int, err error) {
	dead := map[string]bool{}
	v2, v1 := findHierarchies()
	for _, own := range []string{v2.own, v1.own} {
		if own == "" {
			continue
		}
		for _, dir := range subdirs(own) {
			name := filepath.Base(dir)
			tag, ok := strings.CutPrefix(name, treeDirName(""))
			if !ok {
				tag, ok = strings.CutPrefix(name, memDirName(""))
			}
			if ok && OwnerDead(tag, prefix) {
				dead[tag] = true
			}
		}
	}
	if own := v2.own; own == "" || couldNot(own) {
		all, err := allStats()
		if err != nil {
			return 0, err
		}
		for _, st := range all {
			if tag, _, ok := strings.Cut(runMark(st), "-"); ok && OwnerDead(tag, prefix) {
				dead[tag] = true
			}
		}
	}
	var errs []error
	for tag := range dead {
		n, err := Sweep(ctx, tag)
		killed += n
		if err != nil {
			errs = append(errs, err)
		}
	}
	return killed, errors.Join(errs...)
}

// couldNot reports whether runs cannot have cgroups in own.
func couldNot(own string) bool {
	_, why := couldMakeTree(own)
	return why != ""
}
