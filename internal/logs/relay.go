package logs

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// relayAfter is how much a run must have written, in bytes, before it is worth
// a relay.
const relayAfter = 8 << 20

// relay is a second pipe between a program that writes much and its log. While
// pages are copied into a file the kernel holds the lock of the pipe they come
// from, so that the program would have to wait; moving them into another pipe
// first takes next to no time. Like the program's own pipe it must outlive
// this process: what was moved into it is nowhere else.
type relay struct {
	r, w    int
	pending int64 // bytes in it; none but in the middle of a move, after a kill, or while the log cannot be written
}

// openRelay makes a relay of the read end of a pipe, which it takes over.
func openRelay(f *os.File) (*relay, error) {
	defer f.Close()
	r, _, err := dupPipe(f)
	if err != nil {
		return nil, err
	}
	w, err := unix.Open("/proc/self/fd/"+strconv.Itoa(r), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		_ = unix.Close(r)
		return nil, os.NewSyscallError("open", err)
	}
	y := &relay{r: r, w: w}
	n, err := unix.IoctlGetInt(r, unix.TIOCINQ)
	if err != nil {
		y.close()
		return nil, os.NewSyscallError("ioctl", err)
	}
	y.pending = int64(n)
	if size, err := unix.FcntlInt(uintptr(w), unix.F_SETPIPE_SZ, pipeSize); (err != nil || size < pipeSize) && n == 0 {
		y.close()
		return nil, errors.New("the user's pipes are too large already for another of 1 MiB")
	}
	return y, nil
}

func (y *relay) close() {
	_ = unix.Close(y.r)
	_ = unix.Close(y.w)
}

// fill moves up to want bytes out of a pipe into the empty relay.
func (y *relay) fill(pipe, want int) (int64, error) {
	for {
		n, err := unix.Splice(pipe, nil, y.w, nil, want, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		y.pending += max(n, 0)
		return n, err
	}
}

// wantsRelay says whether c has shown that it writes much.
func (c *Capture) wantsRelay() bool {
	return c.relay == nil && !c.noRelay && c.s.ck == nil && c.m.o.Relay != nil && c.stats.Bytes >= c.m.relayAfter
}

// makeRelay gets c a relay; without one it goes on as before.
func (c *Capture) makeRelay() {
	c.noRelay = true // it is asked for once
	f, err := c.m.o.Relay(c.src, c.pipeIno)
	if err != nil {
		return
	}
	c.relay, err = openRelay(f)
	c.relayed = true
	if err != nil {
		c.relay = nil
	}
}

// Adopt is [Manager.Attach] of a pipe that an earlier manager had, together
// with the relay that one had got for it from [Options.Relay] (nil: none),
// which the manager owns in any case.
func (m *Manager) Adopt(src Source, pipe, relay *os.File, t Target) (*Capture, error) {
	if relay == nil {
		return m.attach(src, pipe, nil, t, true)
	}
	y, err := openRelay(relay)
	if err != nil {
		y = nil
	}
	c, err := m.attach(src, pipe, y, t, true)
	if err != nil && y != nil {
		y.close()
	}
	return c, err
}
