// Package monitor reads from /proc what processes use: CPU time and memory of
// many process trees in one pass, who descends from whom, and whether a
// program that was just started has come to rest.
//
// Invariant: what one process used is never charged to another that got its
// pid later; identity is pid and start time.
//
// It must never import another package of Remuda, signal a process, or keep a
// goroutine: it looks when it is asked to.
package monitor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel's USER_HZ, the unit of times in /proc/PID/stat, is 100 on every
// Linux that Go runs on.
const tick = time.Second / 100

// minSpan is the shortest time over which a CPU share is worked out: over less,
// one tick more or less would be most of the figure. A look that comes sooner
// repeats the last one.
const minSpan = 100 * time.Millisecond

// Usage is what the processes of one group use.
type Usage struct {
	// CPU is percent of one core since the last look, summed over the group's
	// processes; of a process seen for the first time, since it started.
	CPU float64
	// RSS is resident memory in bytes, summed: pages shared between
	// processes count once for each.
	RSS int64
	// Procs is how many of the pids were alive, zombies not counted.
	Procs int
}

// Sampler reads /proc. Make one with [NewSampler]. Safe for use by several
// goroutines, one look at a time.
type Sampler struct {
	mu    sync.Mutex
	proc  int // descriptor of /proc, -1 once closed
	page  int64
	gen   uint32
	seen  map[int32]seen
	buf   []byte
	path  []byte
	pairs []pair
}

// seen is what is kept of a process from look to look.
type seen struct {
	start uint64        // ticks since boot
	used  time.Duration // CPU time by then
	at    time.Duration // when, since boot
	read  time.Duration // when stat was read
	rss   int64         // bytes
	cpu   float32
	gen   uint32
}

type pair struct{ pid, ppid int32 }

// maxStale is how long a process that does not run is taken to keep its memory:
// the kernel may reclaim some.
const maxStale = 30 * time.Second

// NewSampler opens /proc. The caller must Close the sampler.
func NewSampler() (*Sampler, error) {
	fd, err := openProc()
	if err != nil {
		return nil, err
	}
	return &Sampler{proc: fd, page: int64(os.Getpagesize()), seen: make(map[int32]seen)}, nil
}

func openProc() (int, error) {
	fd, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "/proc", Err: err}
	}
	return fd, nil
}

// Close gives the descriptor of /proc back. Looks after it find nothing.
func (s *Sampler) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc >= 0 {
		_ = unix.Close(s.proc)
		s.proc = -1
	}
}

// Sample looks at the processes of all groups (id → pids) and returns the
// usage of each. A pid that no longer exists counts for nothing; a group of
// which none does has a zero Usage. Processes that are in no group of this
// look are forgotten.
func (s *Sampler) Sample(groups map[int][]int) map[int]Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gen++
	out := make(map[int]Usage, len(groups))
	now := sinceBoot()
	for id, pids := range groups {
		var u Usage
		for _, pid := range pids {
			p, ok := s.look(int32(pid), now)
			if !ok {
				continue
			}
			p.gen = s.gen
			s.seen[int32(pid)] = p
			u.Procs++
			u.RSS += p.rss
			u.CPU += float64(p.cpu)
		}
		out[id] = u
	}
	for pid, p := range s.seen {
		if p.gen != s.gen {
			delete(s.seen, pid)
		}
	}
	return out
}

// look looks at one process; false where there is none.
func (s *Sampler) look(pid int32, now time.Duration) (seen, bool) {
	if s.proc < 0 || pid <= 0 {
		return seen{}, false
	}
	p, known := s.seen[pid]
	used, clock := cpuTime(int(pid))
	if clock && known && used == p.used && now-p.read < maxStale {
		// It has not run for a nanosecond, so it is the same process, still
		// there, with the memory it had: no need to open a file. This is what
		// makes idle programs next to free.
		return charge(p, p.start, used, now), true
	}
	st, ok := s.stat(int(pid))
	if !ok || st.state == 'Z' || st.state == 'X' {
		return seen{}, false
	}
	if !clock { // some sandboxes have no such clock
		used = time.Duration(st.ticks) * tick
	}
	p = charge(p, st.start, used, now)
	p.rss, p.read = st.rss*s.page, now
	return p, true
}

// charge works out the CPU share of a process since p, the look before, which
// is that of another process (or none) where the start differs.
func charge(p seen, start uint64, used, now time.Duration) seen {
	if p.start != start || p.at == 0 {
		p = seen{start: start, at: time.Duration(start) * tick}
	} else if now-p.at < minSpan {
		return p
	}
	// A start is only known to the tick; a process younger than that must not
	// show an absurd share.
	span := max(now-p.at, tick)
	// Times in ticks are adjusted by the kernel and can step back.
	p.cpu = float32(100 * max(0, used-p.used).Seconds() / span.Seconds())
	p.used, p.at = used, now
	return p
}

// Descendants returns, from one scan of /proc, the process tree of each pid
// given: itself first, then its descendants. A process below several of them
// belongs to the nearest. A pid that does not exist is left out. What left the
// tree (its parent ended) is not found this way.
func (s *Sampler) Descendants(pids ...int) (map[int][]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.scan(); err != nil {
		return nil, err
	}
	parent := make(map[int32]int32, len(s.pairs))
	for _, p := range s.pairs {
		parent[p.pid] = p.ppid
	}
	// owner: the leader above a pid, 0 for none. It doubles as the memory of
	// what was walked, so the whole is linear.
	owner := make(map[int32]int32, len(s.pairs))
	out := make(map[int][]int, len(pids))
	for _, pid := range pids {
		if _, ok := parent[int32(pid)]; ok {
			owner[int32(pid)] = int32(pid)
			out[pid] = []int{pid}
		}
	}
	var walk []int32
	for _, p := range s.pairs {
		pid := p.pid
		walk = walk[:0]
		own, known := owner[pid]
		for !known {
			walk = append(walk, pid)
			up, ok := parent[pid]
			// The scan is no snapshot: a pid that was reused during it could
			// even close a circle, and no true chain is longer than all.
			if !ok || up == 0 || len(walk) > len(s.pairs) {
				own = 0
				break
			}
			pid = up
			own, known = owner[pid]
		}
		for _, w := range walk {
			owner[w] = own
		}
		if own != 0 && own != p.pid {
			out[int(own)] = append(out[int(own)], int(p.pid))
		}
	}
	return out, nil
}

// scan fills s.pairs with every process of /proc.
func (s *Sampler) scan() error {
	if s.proc < 0 {
		return os.ErrClosed
	}
	s.pairs = s.pairs[:0]
	if _, err := unix.Seek(s.proc, 0, 0); err != nil {
		return &os.PathError{Op: "seek", Path: "/proc", Err: err}
	}
	dir := make([]byte, 32<<10)
	for {
		n, err := unix.Getdents(s.proc, dir)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "getdents", Path: "/proc", Err: err}
		}
		if n <= 0 {
			return nil
		}
		for b := dir[:n]; len(b) >= direntName; {
			size := int(*(*uint16)(unsafe.Pointer(&b[16])))
			if size < direntName || size > len(b) {
				break
			}
			name := b[direntName:size]
			b = b[size:]
			if i := bytes.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
			pid, ok := number(name)
			if !ok || pid > 1<<30 {
				continue
			}
			if st, ok := s.stat(int(pid)); ok {
				s.pairs = append(s.pairs, pair{int32(pid), st.ppid})
			}
		}
	}
}

// direntName is the offset of the name in a linux_dirent64: u64 inode, s64
// offset, u16 length, u8 type.
const direntName = 19

// stat is what is used of /proc/PID/stat.
type stat struct {
	state byte
	ppid  int32
	ticks uint64 // utime + stime
	start uint64 // ticks since boot
	rss   int64  // pages
}

// stat reads one process without allocating.
func (s *Sampler) stat(pid int) (stat, bool) {
	if s.proc < 0 || pid <= 0 {
		return stat{}, false
	}
	s.path = strconv.AppendInt(s.path[:0], int64(pid), 10)
	s.path = append(s.path, "/stat\x00"...)
	if s.buf == nil {
		s.buf = make([]byte, 2048) // the longest line is well under 1 KiB
	}
	n, err := readAt(s.proc, s.path, s.buf)
	if err != 0 {
		return stat{}, false
	}
	return parseStat(s.buf[:n])
}

// readAt reads the beginning of a file into buf. path ends in a zero byte and
// is relative to dir. The system calls are made by hand: the ones of package
// os and unix allocate a path each.
func readAt(dir int, path, buf []byte) (int, syscall.Errno) {
	fd, _, errno := syscall.Syscall6(syscall.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&path[0])),
		syscall.O_RDONLY|syscall.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	n, _, errno := syscall.Syscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	_, _, _ = syscall.Syscall(syscall.SYS_CLOSE, fd, 0, 0)
	return int(n), errno
}

// parseStat reads a line of /proc/PID/stat. The name, in parentheses, is the
// program's own choice and may hold anything, so fields are counted from the
// last parenthesis.
func parseStat(b []byte) (st stat, ok bool) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || i+2 >= len(b) {
		return stat{}, false
	}
	b = b[i+2:]
	// field 3 of the manual page is the first one here
	for field := 3; len(b) > 0; field++ {
		end := bytes.IndexByte(b, ' ')
		word := b
		if end >= 0 {
			word, b = b[:end], b[end+1:]
		} else {
			b = nil
		}
		if len(word) == 0 {
			return stat{}, false
		}
		var n uint64
		switch field {
		case 3:
			st.state = word[0]
			continue
		case 4, 14, 15, 22, 24:
			if n, ok = number(word); !ok {
				return stat{}, false
			}
		}
		switch field {
		case 4:
			if n > 1<<30 {
				return stat{}, false
			}
			st.ppid = int32(n)
		case 14, 15:
			st.ticks += n
		case 22:
			st.start = n
		case 24:
			if n > 1<<50 {
				return stat{}, false
			}
			st.rss = int64(n)
			return st, true
		}
	}
	return stat{}, false
}

// number reads an unsigned decimal of at most 18 digits or so.
func number(b []byte) (uint64, bool) {
	if len(b) == 0 || len(b) > 19 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	return n, true
}

// sinceBoot is the clock in which the kernel tells when a process started.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// PSS returns the proportional set size of a process in bytes: each shared
// page divided by how many share it. It makes the kernel walk the process's
// whole memory, so it is for a person who asks, not for every look. It needs
// the right to trace the process.
func PSS(pid int) (int64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0, fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	for line := range bytes.Lines(b) {
		rest, ok := bytes.CutPrefix(line, []byte("Pss:"))
		if !ok {
			continue
		}
		if kb, ok := number(bytes.TrimSpace(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte("kB")))); ok {
			return int64(kb) << 10, nil
		}
	}
	return 0, fmt.Errorf("read memory of process %d: no Pss in smaps_rollup", pid)
}
