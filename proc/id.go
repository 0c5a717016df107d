package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ID identifies a process for good: a pid may be reused, a pid together with
// its start time may not.
type ID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot: field 22 of /proc/PID/stat
}

// Identify returns the ID of the process that has the pid now; an error that
// is [os.ErrProcessDone] where there is none. A zombie still has its ID.
func Identify(pid int) (ID, error) {
	st, err := readStat(pid)
	if err != nil {
		return ID{}, err
	}
	return ID{PID: pid, Start: st.start}, nil
}

// Alive reports whether the process still runs; a zombie does not.
func (id ID) Alive() bool {
	if id.PID <= 0 {
		return false
	}
	st, err := readStat(id.PID)
	return err == nil && st.start == id.Start && st.live()
}

// Signal sends sig to exactly this process; [os.ErrProcessDone] where it is
// gone, whoever has its pid now.
func (id ID) Signal(sig syscall.Signal) error {
	if id.PID <= 0 {
		return os.ErrProcessDone
	}
	fd, err := unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	if err != nil {
		// No pidfd here (an old kernel, a seccomp filter): check, then signal.
		if !id.Alive() {
			return os.ErrProcessDone
		}
		return signalError(syscall.Kill(id.PID, sig))
	}
	defer func() { _ = unix.Close(fd) }()
	// The pidfd is fixed to a process; this makes sure that it is the one meant.
	st, err := readStat(id.PID)
	if err != nil || st.start != id.Start {
		return os.ErrProcessDone
	}
	return signalError(unix.PidfdSendSignal(fd, sig, nil, 0))
}

func signalError(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// stat is what this package reads of /proc/PID/stat.
type stat struct {
	pid, ppid, pgrp, session int
	threads                  int
	state                    byte
	exiting                  bool // it is past the point of no return, though not yet dead
	start                    uint64
}

func readStat(pid int) (stat, error) {
	var buf [1024]byte
	b, err := readSmall("/proc/"+strconv.Itoa(pid)+"/stat", buf[:])
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			return stat{}, fmt.Errorf("pid %d: %w", pid, os.ErrProcessDone)
		}
		return stat{}, &os.PathError{Op: "read", Path: "/proc/" + strconv.Itoa(pid) + "/stat", Err: err}
	}
	st, ok := parseStat(b)
	if !ok {
		return stat{}, fmt.Errorf("pid %d: /proc stat has an unknown form", pid)
	}
	st.pid = pid
	return st, nil
}

// parseStat reads "pid (comm) state ppid pgrp session …"; comm may hold spaces
// and parentheses, so the fields count from the last ')'.
func parseStat(b []byte) (st stat, ok bool) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || i+3 >= len(b) {
		return st, false
	}
	b = b[i+2:]
	st.state = b[0]
	field := 3
	for len(b) > 0 {
		var f []byte
		if j := bytes.IndexByte(b, ' '); j >= 0 {
			f, b = b[:j], b[j+1:]
		} else {
			f, b = b, nil
		}
		switch field {
		case 4:
			st.ppid, _ = atoi(f)
		case 5:
			st.pgrp, _ = atoi(f)
		case 6:
			st.session, _ = atoi(f)
		case 9:
			flags, _ := atoi(f)
			st.exiting = flags&0x4 != 0 // PF_EXITING
		case 20:
			st.threads, _ = atoi(f)
		case 22:
			for _, c := range f {
				if c < '0' || c > '9' {
					return st, false
				}
				st.start = st.start*10 + uint64(c-'0')
			}
			return st, len(f) > 0
		}
		field++
	}
	return st, false
}

// waitID is waitid(2); pid receives the pid of the child concerned, if not nil.
func waitID(idType, id, options int, pid *int) error {
	var info siginfo
	_, _, errno := syscall.Syscall6(unix.SYS_WAITID, uintptr(idType), uintptr(id), uintptr(unsafe.Pointer(&info)), uintptr(options), 0, 0)
	if errno != 0 {
		return errno
	}
	if pid != nil {
		*pid = int(info.pid)
	}
	return nil
}

// siginfo is the part of siginfo_t that waitid fills, as long as the kernel's
// 128 bytes. The padding before pid is there on 64-bit machines only.
type siginfo struct {
	signo, errno, code int32
	_                  [unsafe.Sizeof(uintptr(0)) - 4]byte
	pid                int32
	_                  [112]byte
}

func atoi(b []byte) (int, bool) {
	n, err := strconv.Atoi(string(b))
	return n, err == nil
}

// readSmall reads up to len(buf) bytes of a kernel file without the poller and
// the finalizer that an os.File brings.
func readSmall(path string, buf []byte) ([]byte, error) {
	fd, err := openRetry(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	return readFD(fd, buf)
}

// readFD fills buf from fd until its end.
func readFD(fd int, buf []byte) ([]byte, error) {
	n := 0
	for n < len(buf) {
		m, err := unix.Read(fd, buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return buf[:n], nil
}

// readWhole reads a kernel file of any size up to limit bytes.
func readWhole(path string, limit int) ([]byte, error) {
	fd, err := openRetry(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, 0, 1024)
	for len(buf) < limit {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		m, err := unix.Read(fd, buf[len(buf):cap(buf)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return buf, err
		}
		if m == 0 {
			break
		}
		buf = buf[:len(buf)+m]
	}
	return buf, nil
}

// writeFile writes a kernel file in one write.
func writeFile(path, text string) error {
	fd, err := openRetry(path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	for {
		_, err = unix.Write(fd, []byte(text))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func openRetry(path string, mode int) (int, error) {
	for {
		fd, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func signalName(s syscall.Signal) string {
	if n := unix.SignalName(s); n != "" {
		return n
	}
	return "signal " + strconv.Itoa(int(s))
}
