package monitor

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Look is what one look at a starting program found.
type Look int

// What [Rest.Look] can find.
const (
	// Busy: it (or a process below it) runs, waits for the disk, or used CPU
	// time since the last look. The first look never says more than this.
	Busy Look = iota
	// AtRest: every thread of the tree sleeps, and no process has used more than
	// next to no CPU time since the last look: it has done what it does at its start.
	AtRest
	// Gone: it ended (a zombie has).
	Gone
)

// maxTree bounds how many processes below a program are looked at.
const maxTree = 64

// Rest looks again and again at a program that was just started, to tell
// soon and without a fixed wait whether it came to rest or died. A look costs
// about ten microseconds a thread; 5 to 20 ms between looks is a good rhythm. Not
// safe for use by several goroutines.
type Rest struct {
	pid   int
	start uint64
	procs int
	cpu   time.Duration
	at    time.Duration
	s     Sampler // for its buffers and descriptor
}

// NewRest begins with the process that has this pid now. The caller must
// Close it.
func NewRest(pid int) (*Rest, error) {
	fd, err := openProc()
	if err != nil {
		return nil, err
	}
	r := &Rest{pid: pid, s: Sampler{proc: fd}}
	if st, ok := r.s.stat(pid); ok {
		r.start = st.start
	}
	return r, nil
}

// Close frees what Rest holds.
func (r *Rest) Close() { r.s.Close() }

// Look looks.
func (r *Rest) Look() Look {
	st, ok := r.s.stat(r.pid)
	if !ok || st.start != r.start || st.state == 'Z' || st.state == 'X' {
		return Gone
	}
	now := sinceBoot()
	busy := false
	cpu := time.Duration(0)
	tree := []int{r.pid}
	for i := 0; i < len(tree) && i < maxTree; i++ {
		st, ok := r.s.stat(tree[i])
		if !ok {
			busy = true // ended while we looked: things are moving
			continue
		}
		busy = busy || working(st)
		c, ok := cpuTime(tree[i])
		if !ok {
			c = time.Duration(st.ticks) * tick
		}
		cpu += c
		var works bool
		tree, works = r.threads(tree, tree[i])
		busy = busy || works
	}
	// Timers and the like are no start-up: up to 2 % of a core is rest.
	used, span := cpu-r.cpu, now-r.at
	if len(tree) != r.procs || used < 0 || used > span/50 {
		busy = true
	}
	r.cpu, r.at, r.procs = cpu, now, len(tree)
	if busy {
		return Busy
	}
	return AtRest
}

// working: it runs, waits for its turn, or for the disk.
func working(st stat) bool { return st.state == 'R' || st.state == 'D' }

// threads appends the children of all threads of pid, and says whether any of
// the threads works: on a busy machine it may wait long for its turn and use no
// CPU time, while the first thread sleeps. A kernel without
// CONFIG_PROC_CHILDREN shows no children, and the program alone is judged.
func (r *Rest) threads(tree []int, pid int) (_ []int, works bool) {
	dir := "/proc/" + strconv.Itoa(pid) + "/task"
	d, err := os.Open(dir)
	if err != nil {
		return tree, false
	}
	defer d.Close()
	tids, err := d.Readdirnames(maxTree)
	if err != nil {
		return tree, false
	}
	var buf [1024]byte
	for _, tid := range tids {
		file := func(name string) []byte {
			path := append([]byte(dir[len("/proc/"):]), '/')
			path = append(append(path, tid...), name...)
			n, errno := readAt(r.s.proc, path, buf[:])
			if errno != 0 {
				return nil
			}
			return buf[:n]
		}
		if st, ok := parseStat(file("/stat\x00")); ok {
			works = works || working(st)
		}
		for word := range bytes.FieldsSeq(file("/children\x00")) {
			if child, ok := number(word); ok && len(tree) < maxTree {
				tree = append(tree, int(child))
			}
		}
	}
	return tree, works
}

// cpuTime is the CPU time of a whole process in nanoseconds, where stat has
// only hundredths of a second.
func cpuTime(pid int) (time.Duration, bool) {
	// What clock_getcpuclockid makes: CPUCLOCK_SCHED (2) of the process.
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^uint32(pid)<<3|2), &ts); err != nil {
		return 0, false
	}
	return time.Duration(ts.Nano()), true
}

// Settled reports whether the program has come to rest, by two looks 10 ms
// apart: it blocks for that long. False also where it is gone.
func Settled(pid int) bool {
	r, err := NewRest(pid)
	if err != nil {
		return false
	}
	defer r.Close()
	if r.Look() == Gone {
		return false
	}
	time.Sleep(tick)
	return r.Look() == AtRest
}
