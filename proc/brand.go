package proc

import (
	"hash/fnv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// rlimitLocks is RLIMIT_LOCKS, which Linux has not looked at since 2.4 but
// still keeps, hands on to children, and shows. So its soft limit serves as a
// brand: unlike the environment it outlives every fork and exec, and an
// ordinary user may set it.
const rlimitLocks = 10

// brandOf is the brand of a run: the upper half stands for the instance tag,
// the lower for the run. It is far from any limit that somebody would set.
func brandOf(tag, unique string) uint64 {
	return uint64(brandHash(tag)|1<<30)<<32 | uint64(brandHash(unique))
}

func brandHash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s))
	return h.Sum32() & 0x7fffffff
}

// brandedBy reports whether a brand is of a run of the instance tag.
func brandedBy(tag string, brand uint64) bool {
	return brand != 0 && brand != unix.RLIM_INFINITY && brand>>32 == uint64(brandHash(tag)|1<<30)
}

// brandedAs reads the brand of a process, 0 where it has none or it may not be
// read.
func brandedAs(pid int) uint64 {
	var is unix.Rlimit
	if unix.Prlimit(pid, rlimitLocks, nil, &is) != nil || is.Cur == unix.RLIM_INFINITY {
		return 0
	}
	return is.Cur
}

// brandLock guards the limit of this process, which the child inherits, for
// the moment of a fork.
var brandLock sync.Mutex

// forkExec is syscall.ForkExec of a process with a brand. Where the limit
// cannot be set the child goes without, and where a cgroup holds it it needs
// none.
func forkExec(path string, args []string, attr *syscall.ProcAttr, brand uint64) (int, error) {
	if attr.Sys.UseCgroupFD {
		return syscall.ForkExec(path, args, attr)
	}
	brandLock.Lock()
	defer brandLock.Unlock()
	var own unix.Rlimit
	if unix.Prlimit(0, rlimitLocks, nil, &own) == nil && own.Max >= brand {
		branded := unix.Rlimit{Cur: brand, Max: own.Max}
		if unix.Prlimit(0, rlimitLocks, &branded, nil) == nil {
			defer func() { _ = unix.Prlimit(0, rlimitLocks, &own, nil) }()
		}
	}
	return syscall.ForkExec(path, args, attr)
}
