package logs

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Plain descriptors are used instead of *os.File: a file here is 4 bytes, and
// the offsets are ours.

func openFile(path string, flags int) (int, error) {
	for {
		// O_NONBLOCK: a FIFO put in our way must not hang the writer.
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return fd, nil
	}
}

// preadFull reads until b is full or the file ends (io.EOF).
func preadFull(fd int, b []byte, off int64) (int, error) {
	n := 0
	for n < len(b) {
		k, err := unix.Pread(fd, b[n:], off+int64(n))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return n, err
		case k == 0:
			return n, io.EOF
		default:
			n += k
		}
	}
	return n, nil
}

func pwriteFull(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		k, err := unix.Pwrite(fd, b, off)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case k == 0:
			return io.ErrShortWrite
		default:
			b, off = b[k:], off+int64(k)
		}
	}
	return nil
}

// lastNewline returns the offset behind the last newline of the first size
// bytes, looking back at most MaxLine bytes; ok is false where there is none
// so near (the file's beginning counts as one).
func lastNewline(fd int, size int64) (off int64, ok bool, err error) {
	step := int64(4096)
	for end := size; end > 0 && size-end < MaxLine; step = 65536 {
		k := min(step, end)
		b := make([]byte, k)
		if _, err := preadFull(fd, b, end-k); err != nil {
			return 0, false, err
		}
		for i := k - 1; i >= 0; i-- {
			if b[i] == '\n' {
				return end - k + i + 1, true, nil
			}
		}
		end -= k
		if end == 0 {
			return 0, true, nil
		}
	}
	return size, size == 0, nil
}
