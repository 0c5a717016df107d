package ipc

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

// MaxFiles is how many descriptors a message carries at most.
const MaxFiles = 16

// ErrNoFiles says that the other side of a channel takes no descriptors.
var ErrNoFiles = errors.New("ipc: the other side takes no descriptors")

// The kinds of descriptors. They are what never changes about one.
const (
	kindFile      = 1 // no socket
	kindStream    = 2 // SOCK_STREAM: a connection or a listener
	kindDatagram  = 3 // SOCK_DGRAM
	kindSeqpacket = 4 // SOCK_SEQPACKET
)

// kindOf returns the kind of a descriptor, 0 for one that has none.
func kindOf(fd int) byte {
	t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	switch {
	case errors.Is(err, unix.ENOTSOCK):
		return kindFile
	case err != nil:
		return 0
	case t == unix.SOCK_STREAM:
		return kindStream
	case t == unix.SOCK_DGRAM:
		return kindDatagram
	case t == unix.SOCK_SEQPACKET:
		return kindSeqpacket
	}
	return 0
}

// dup returns duplicates of files for the other side.
func (c *Channel) dup(files []*os.File) ([]int, error) {
	if len(files) > MaxFiles {
		return nil, fmt.Errorf("%w: %d descriptors, where %d are allowed", ErrTooLarge, len(files), MaxFiles)
	}
	if !c.open.Load() {
		return nil, ErrNoFiles
	}
	fds, err := fdpass.Dup(files)
	if err != nil {
		return nil, fmt.Errorf("ipc: %w", err)
	}
	for i, fd := range fds {
		if kindOf(fd) == 0 {
			fdpass.Close(fds)
			return nil, fmt.Errorf("ipc: %s cannot be passed: a raw socket or an O_PATH file", files[i].Name())
		}
	}
	return fds, nil
}

// handles appends the HANDLES frame that files need, and returns duplicates of
// them.
func (c *Channel) handles(dst []byte, id uint32, files []*os.File) ([]byte, []int, error) {
	if len(files) == 0 {
		return dst, nil, nil
	}
	fds, err := c.dup(files)
	if err != nil {
		return nil, nil, err
	}
	return appendHandles(dst, id, fds), fds, nil
}

// appendHandles appends the HANDLES frame that fds need: none for none.
func appendHandles(dst []byte, id uint32, fds []int) []byte {
	if len(fds) == 0 {
		return dst
	}
	dst = AppendHeader(dst, TypeHandles, id, len(fds))
	for _, fd := range fds {
		dst = append(dst, kindOf(fd))
	}
	return dst
}

// withFiles takes what the HANDLES frame h announces and returns the frame that
// it belongs to, which is the next.
func (c *Channel) withFiles(h Frame) (Frame, bool, error) {
	if len(h.Payload) == 0 {
		return Frame{}, false, fmt.Errorf("%w: HANDLES without any", ErrProtocol)
	}
	kinds := append([]byte(nil), h.Payload...)
	files, err := c.in.take(len(kinds))
	if err != nil {
		return Frame{}, false, err
	}
	for i, f := range files {
		var kind byte
		if rc, err := f.SyscallConn(); err == nil {
			_ = rc.Control(func(fd uintptr) { kind = kindOf(int(fd)) })
		}
		if kind != kinds[i] || kind == 0 {
			closeFiles(files)
			return Frame{}, false, fmt.Errorf("%w: a descriptor of kind %d was announced as %d", ErrProtocol, kind, kinds[i])
		}
	}
	f, owned, err := c.r.next()
	if err == nil && (f.ID != h.ID || f.Type != TypeTask && f.Type != TypeResult) {
		err = fmt.Errorf("%w: HANDLES for %d precede %s for %d", ErrProtocol, h.ID, f.Type, f.ID)
	}
	if err != nil {
		closeFiles(files)
		return Frame{}, false, unexpected(err)
	}
	f.Files = files
	return f, owned, nil
}
