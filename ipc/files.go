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

// special does what there is to be done about a frame that is not for the one
// who calls Receive, and returns the one that is.
func (c *Channel) special(f Frame, owned bool) (Frame, bool, error) {
	var err error
	switch f.Type {
	case TypeHandles, TypeShared:
		return c.preceded(f)
	case TypeSegment:
		err = c.theirs.add(f.ID, f.Payload, c.in)
	case TypeForget:
		err = c.theirs.forget(f.ID)
	case TypeRelease:
		if c.parent {
			err = fmt.Errorf("%w: RELEASE from a worker", ErrProtocol)
		} else {
			err = c.own.released(f.ID)
		}
	}
	return f, owned, err
}

// preceded takes what f, a HANDLES or SHARED frame, announces and returns the
// frame that it belongs to, which is the next, but for the other of the two.
func (c *Channel) preceded(f Frame) (to Frame, owned bool, err error) {
	id, of := f.ID, f.Type
	var with Frame
	defer func() {
		if err != nil {
			with.drop()
			to, err = Frame{}, unexpected(err)
		}
	}()
	for ; err == nil && (f.Type == TypeHandles || f.Type == TypeShared) && f.ID == id; f, owned, err = c.r.next() {
		of = f.Type
		switch {
		case f.Type == TypeHandles && with.Files == nil:
			if with.Files, err = c.announced(f.Payload); err != nil {
				return f, false, err
			}
		case f.Type == TypeShared && with.Shared == nil:
			if with.Shared, err = c.theirs.use(f.Payload, c.r.limit); err != nil {
				return f, false, err
			}
		default:
			return f, false, fmt.Errorf("%w: a second %s for %d", ErrProtocol, f.Type, id)
		}
	}
	switch {
	case err != nil:
		return f, false, err
	case f.ID != id || f.Type != TypeTask && f.Type != TypeResult:
		return f, false, fmt.Errorf("%w: %s for %d precedes %s for %d", ErrProtocol, of, id, f.Type, f.ID)
	case with.Shared != nil && f.Type == TypeResult && len(f.Payload) > 0:
		return f, false, fmt.Errorf("%w: a result both in shared memory and not", ErrProtocol)
	}
	f.Files, f.Shared = with.Files, with.Shared
	if f.Shared != nil {
		f.Shared.tell = f.Type == TypeResult
	}
	return f, owned, nil
}

// drop gives back what came along with a frame.
func (f *Frame) drop() {
	closeFiles(f.Files)
	f.Shared.Release()
	f.Files, f.Shared = nil, nil
}

// announced takes the descriptors that a HANDLES frame announces.
func (c *Channel) announced(payload []byte) ([]*os.File, error) {
	if len(payload) == 0 {
		return nil, fmt.Errorf("%w: HANDLES without any", ErrProtocol)
	}
	kinds := append([]byte(nil), payload...)
	files, err := c.in.take(len(kinds))
	if err != nil {
		return nil, err
	}
	for i, f := range files {
		var kind byte
		if rc, err := f.SyscallConn(); err == nil {
			_ = rc.Control(func(fd uintptr) { kind = kindOf(int(fd)) })
		}
		if kind != kinds[i] || kind == 0 {
			closeFiles(files)
			return nil, fmt.Errorf("%w: a descriptor of kind %d was announced as %d", ErrProtocol, kind, kinds[i])
		}
	}
	return files, nil
}
