// Package fdpass sends descriptors over Unix sockets and receives them
// (SCM_RIGHTS).
//
// Invariant: a descriptor that arrives is close-on-exec from the first and is
// either the caller's or closed, also where the message was cut.
//
// It must never import a package of Remuda, wait for a socket, or decide what a
// descriptor is for.
package fdpass

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Max is the largest number of descriptors in one message (the kernel's
// SCM_MAX_FD).
const Max = 253

// ErrTruncated says that more descriptors came than there was room for, or that
// the process has no number left for them. Those that did arrive are closed.
var ErrTruncated = errors.New("more descriptors were passed than are allowed, or none is free")

// Dup returns close-on-exec duplicates of files, which are the caller's.
func Dup(files []*os.File) ([]int, error) {
	fds := make([]int, 0, len(files))
	for _, f := range files {
		if f == nil {
			Close(fds)
			return nil, fmt.Errorf("duplicate a descriptor: %w", os.ErrInvalid)
		}
		fd, err := DupFile(f)
		if err != nil {
			Close(fds)
			return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// DupFile returns a close-on-exec duplicate of f, which is the caller's. Unlike
// f's Fd it leaves f as it is.
func DupFile(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, errDup := -1, error(nil)
	if err := rc.Control(func(p uintptr) { fd, errDup = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	return fd, os.NewSyscallError("fcntl", errDup)
}

// Close closes all of fds.
func Close(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// Parse takes the descriptors out of control messages; they are the caller's.
func Parse(oob []byte) []int {
	if len(oob) == 0 {
		return nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var fds []int
	for i := range msgs {
		// The kernel passes whole numbers; the parser panics at others.
		msgs[i].Data = msgs[i].Data[:len(msgs[i].Data)&^3]
		if f, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds
}

// Drop closes the descriptors in control messages.
func Drop(oob []byte) { Close(Parse(oob)) }

// Send sends what vec points to, and fds with the first byte of it, without
// blocking. It returns how many bytes went out; if that is not 0, all of fds
// did. fds stay the caller's.
func Send(fd uintptr, vec []unix.Iovec, fds []int) (int, error) {
	h := unix.Msghdr{Iov: unsafe.SliceData(vec)}
	h.SetIovlen(len(vec))
	if len(fds) > 0 {
		oob := unix.UnixRights(fds...)
		h.Control = &oob[0]
		h.SetControllen(len(oob))
	}
	for {
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&h)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Receiver receives from a stream socket. It keeps its buffers, so that a read
// costs what read(2) does; only descriptors that come along allocate. It is for
// one goroutine at a time.
type Receiver struct {
	oob []byte
	iov unix.Iovec
	hdr unix.Msghdr
}

// NewReceiver makes one that takes up to room descriptors a read, at least 1 and
// at most [Max].
func NewReceiver(room int) *Receiver {
	return &Receiver{oob: make([]byte, unix.CmsgLen(4*min(max(room, 1), Max)))}
}

// Receive reads once, without blocking. The descriptors that came with what was
// read are the caller's. n is 0 at the end of the stream. Errors: syscall.EAGAIN
// where nothing is there, ErrTruncated, or the system's.
func (r *Receiver) Receive(fd uintptr, b []byte) (n int, fds []int, err error) {
	if len(b) == 0 {
		return 0, nil, os.ErrInvalid // 0 would look like the end
	}
	r.iov.Base = &b[0]
	r.iov.SetLen(len(b))
	r.hdr = unix.Msghdr{Iov: &r.iov, Iovlen: 1, Control: &r.oob[0]}
	r.hdr.SetControllen(len(r.oob))
	var got uintptr
	var errno syscall.Errno
	for {
		got, _, errno = unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&r.hdr)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if errno != unix.EINTR {
			break
		}
	}
	r.iov.Base = nil
	if errno != 0 {
		return 0, nil, errno
	}
	if r.hdr.Controllen > 0 {
		fds = Parse(r.oob[:r.hdr.Controllen])
	}
	if r.hdr.Flags&unix.MSG_CTRUNC != 0 {
		Close(fds)
		return 0, nil, ErrTruncated
	}
	return int(got), fds, nil
}
