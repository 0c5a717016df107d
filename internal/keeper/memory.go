package keeper

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tune makes the Go runtime small: the keeper is always there, does little and
// allocates little.
func tune() {
	debug.SetGCPercent(30)
	runtime.GOMAXPROCS(min(2, runtime.NumCPU()))
	GiveBack()
}

// GiveBack returns memory of this process that is not in use to the system: free
// heap, and pages of the executable that only its start needed. It takes some
// milliseconds.
func GiveBack() {
	debug.FreeOSMemory()
	dropFilePages()
}

// dropFilePages unmaps the pages of the executable that were touched by the
// initializers of packages which the keeper does not use, since it is the same
// binary as everything else. The pages stay in the page cache and the few that
// are needed come back by themselves. Only mappings that are read-only and
// hold no page of their own (Anonymous: 0) qualify: in a position-independent
// executable relocated pages are read-only, too, and would lose what the
// dynamic loader wrote there.
func dropFilePages() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return
	}
	var start, end uint64
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if key, value, ok := strings.Cut(line, ":"); ok && key == "Anonymous" {
			if end > start && strings.TrimSpace(value) == "0 kB" {
				_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_DONTNEED)
			}
			start, end = 0, 0
			continue
		}
		f := strings.Fields(line)
		if len(f) < 6 || (f[1] != "r--p" && f[1] != "r-xp") || strings.Join(f[5:], " ") != exe {
			if len(f) >= 5 && len(f[1]) == 4 {
				start, end = 0, 0 // another mapping
			}
			continue
		}
		lo, hi, _ := strings.Cut(f[0], "-")
		s, err1 := strconv.ParseUint(lo, 16, 64)
		e, err2 := strconv.ParseUint(hi, 16, 64)
		if err1 == nil && err2 == nil {
			start, end = s, e
		}
	}
}
