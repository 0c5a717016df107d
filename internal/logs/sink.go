package logs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	chunk    = 1 << 20   // bytes a splice takes at most
	pipeSize = 1 << 20   // what a pipe seen full is widened to
	turn     = 4 << 20   // bytes a capture may take before others of its writer
	batch    = 256 << 10 // bytes of rewritten lines written at once
	readSize = 64 << 10
)

// sink is one log file with the captures that write into it. mu guards it and
// them; who holds it may do file I/O.
type sink struct {
	m     *Manager
	path  string
	names // of path
	shard int
	t     Target

	mu        sync.Mutex
	dead      bool // no captures are left; look it up again
	caps      []*Capture
	recovered bool // no rotation is half done
	noCut     time.Time
	fd        int // -1: closed
	ino       uint64
	size      int64 // where the next byte goes
	born      time.Time
	used      time.Time
	idx       indexWriter
	ck        *ckpt // nil: pipe → log without a spool between
	copying   bool  // the file system cannot splice
}

// rewrites says whether bytes cannot go straight into the log.
func (s *sink) rewrites() bool {
	return s.t.JSON || s.t.TimeFormat != "" || s.t.Shared || len(s.caps) > 1
}

func (s *sink) closeLog() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
		s.fd = -1
		s.m.opened(s, false)
	}
	s.idx.close()
}

func (s *sink) closeAll() {
	s.closeLog()
	s.ck.close()
	for _, c := range s.caps {
		c.closeSpool()
	}
}

// openLog opens the log, if it is not.
func (s *sink) openLog() error {
	if s.fd >= 0 {
		return nil
	}
	if !s.recovered {
		if err := s.recoverCut(); err != nil {
			return err
		}
		s.recovered = true
	}
	fd, err := openFile(s.path, unix.O_RDWR|unix.O_CREAT)
	if errors.Is(err, unix.ENOENT) {
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return err
		}
		fd, err = openFile(s.path, unix.O_RDWR|unix.O_CREAT)
	}
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return &os.PathError{Op: "stat", Path: s.path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return fmt.Errorf("log %s is not a regular file any more", s.path)
	}
	s.fd, s.ino, s.size = fd, st.Ino, st.Size
	s.m.opened(s, true)
	_ = os.Mkdir(filepath.Join(s.dir, stateDir), 0o700)
	s.idx.open(s.state(".idx"), s.ino, s.size)
	s.born = time.Time{}
	if s.t.MaxAge > 0 && s.size > 0 {
		s.born = time.Unix(st.Mtim.Unix())
		var r [indexRecord]byte
		if s.idx.n > 0 {
			if n, _ := preadFull(s.idx.fd, r[:], indexHead); n == indexRecord {
				s.born = time.UnixMicro(getIndexRec(r[:]).time)
			}
		}
	}
	return nil
}

// look sees what others did to the open log: it was emptied, or removed.
func (s *sink) look() error {
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return err
	}
	if st.Nlink == 0 {
		s.closeLog()
		s.forgetCkpt()
		for _, c := range s.caps {
			c.start = 0
			if c.tap != nil {
				c.tap.off = 0
			}
		}
		return s.openLog()
	}
	if st.Size < s.size {
		s.size = st.Size
		s.idx.reset(s.ino)
		for _, c := range s.caps {
			c.start = min(c.start, s.size)
			if c.tap != nil {
				c.tap.off = min(c.tap.off, s.size)
			}
		}
		if s.ck != nil && s.ck.fd >= 0 {
			return s.commit(-1, 0, s.size)
		}
	}
	return nil
}

// forgetCkpt makes the open checkpoint speak of the log that is opened next.
func (s *sink) forgetCkpt() {
	if s.ck != nil && s.ck.fd >= 0 {
		s.ino = 0
		_ = s.commit(-1, 0, 0)
	}
}

// ready prepares everything for bytes of c.
func (s *sink) ready(c *Capture) error {
	if s.fd < 0 {
		if err := s.openLog(); err != nil {
			return err
		}
		if s.ck != nil && s.ck.fd < 0 {
			if err := s.openCkpt(true); err != nil {
				return err
			}
		}
	} else if err := s.look(); err != nil {
		return err
	}
	s.used = time.Now()
	if s.ck == nil {
		// A checkpoint that an earlier manager left decides for itself.
		if err := s.openCkpt(false); err != nil {
			return err
		}
		if s.ck == nil && s.rewrites() {
			if err := s.toSpools(); err != nil {
				return err
			}
		}
	}
	if s.ck != nil && s.m.settled.Load() {
		if err := s.endOrphans(); err != nil {
			return err
		}
	}
	return s.begin(c)
}

// begin does what comes before the first byte of c.
func (s *sink) begin(c *Capture) error {
	if s.ck != nil {
		if err := s.openSpool(c); err != nil {
			return err
		}
	}
	if c.begun {
		return nil
	}
	if s.ck == nil {
		if c.adopted {
			c.start = 0
			if s.idx.fd >= 0 {
				c.start = s.idx.lastRun()
			}
		} else {
			if err := s.endLine(); err != nil {
				return err
			}
			c.start = s.size
			s.idx.mark(s.size, s.m.now(), true)
		}
	} else {
		c.start = s.size
	}
	c.begun, c.ino = true, s.ino
	if c.tap != nil {
		c.tap.off = c.start
	}
	return nil
}

// endLine puts a newline where the log does not end in one.
func (s *sink) endLine() error {
	if s.size == 0 {
		return nil
	}
	var b [1]byte
	if _, err := preadFull(s.fd, b[:], s.size-1); err != nil {
		return err
	}
	if b[0] == '\n' {
		return nil
	}
	return s.put([]byte{'\n'})
}

// put writes b at the end of the log, wholly or not at all (but for a kill).
func (s *sink) put(b []byte) error {
	if err := pwriteFull(s.fd, b, s.size); err != nil {
		_ = unix.Ftruncate(s.fd, s.size)
		return &os.PathError{Op: "write", Path: s.path, Err: err}
	}
	s.size += int64(len(b))
	return nil
}

// toSpools changes from "straight" to "by spools". An unfinished line that the
// one capture so far has in the log goes back into its spool.
func (s *sink) toSpools() error {
	var owner *Capture
	for _, c := range s.caps {
		if c.begun || c.adopted {
			owner = c
			break
		}
	}
	off, ok, err := lastNewline(s.fd, s.size)
	if err != nil {
		return err
	}
	if owner == nil || !ok || off == s.size {
		if err := s.endLine(); err != nil {
			return err
		}
		if err := s.newCkpt(nil); err != nil {
			return err
		}
	} else {
		tail := make([]byte, s.size-off)
		if _, err := preadFull(s.fd, tail, off); err != nil {
			return err
		}
		fd, err := openFile(s.spoolPath(owner.pipeIno), unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC)
		if err != nil {
			return err
		}
		err = pwriteFull(fd, append(encodeSpoolHead(owner.src), tail...), 0)
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
		size := s.size
		s.size = off
		if err := s.newCkpt([]slot{{owner.pipeIno, spoolHead}}); err != nil {
			s.size = size
			return err
		}
		if err := unix.Ftruncate(s.fd, off); err != nil {
			return err
		}
		if owner.tap != nil {
			owner.tap.off = min(owner.tap.off, off)
		}
	}
	for _, c := range s.caps {
		s.pump(c) // from now on the lines come from the spools
		if c.tap != nil {
			c.tap.part = nil
		}
	}
	for _, c := range s.caps {
		if c == owner && s.slotOf(c.pipeIno) >= 0 {
			c.adopted = true // its spool is no stranger's
		}
		c.begun = false
	}
	return nil
}

// toDirect goes back when one capture is left and nothing waits in a spool.
func (s *sink) toDirect() {
	if s.ck == nil || s.ck.fd < 0 || s.rewrites() || len(s.caps) != 1 {
		return
	}
	c := s.caps[0]
	for at, x := range s.ck.slots {
		if x.pipe != 0 && (c.sp == nil || at != c.sp.slot || x.pos != c.sp.size) {
			return
		}
	}
	if os.Remove(s.state(".ckpt")) != nil {
		return
	}
	s.ck.close()
	s.ck = nil
	c.dropSpool()
	_ = os.Remove(s.spoolPath(c.pipeIno))
	c.start, c.ino = s.size, s.ino
	if c.tap != nil {
		c.tap.off = s.size
	}
}

// due rotates if it is time to; add is how many bytes are known to come.
func (s *sink) due(add int64) {
	if s.size == 0 {
		return
	}
	now := s.m.now()
	if s.born.IsZero() {
		s.born = now
	}
	bySize := s.t.MaxSize > 0 && s.size+add > s.t.MaxSize
	byAge := s.t.MaxAge > 0 && now.Sub(s.born) >= s.t.MaxAge
	if !bySize && !byAge || now.Before(s.noCut) {
		return
	}
	off := s.size
	if s.ck == nil {
		var err error
		if off, _, err = lastNewline(s.fd, s.size); err != nil || off == 0 {
			return // one line as long as the file, or nothing but it
		}
		for _, c := range s.caps {
			s.pump(c)
		}
	}
	if s.rotate(off) != nil {
		// Rotation is a convenience: without it the file grows.
		s.noCut = now.Add(time.Second)
	}
}

// take brings what is in the pipe of c into the log, at most a turn of it.
// more says that there may be more. An error means that it cannot be written.
func (s *sink) take(c *Capture) (more bool, err error) {
	for taken := int64(0); taken < turn; {
		if s.t.Path == "" {
			n, err := s.discard(c)
			c.stats.Bytes += n
			return false, err
		}
		if s.fd < 0 && c.tr == nil && c.nothing() {
			return false, nil // do not open the log for that
		}
		if err := s.ready(c); err != nil {
			return false, err
		}
		if s.ck != nil && c.sp.size > s.ck.slots[c.sp.slot].pos && (taken == 0) {
			if err := s.transform(c, false); err != nil {
				return false, err
			}
		}
		if err := s.putMark(c); err != nil {
			return false, err
		}
		n, err := s.move(c)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) {
				if taken >= 64<<10 && c.soon() {
					continue
				}
				return false, nil
			}
			return false, err
		}
		if n == 0 {
			c.eof = true
			return false, nil
		}
		taken += n
		c.took(n, s.m.now())
		if s.ck != nil {
			if err := s.transform(c, false); err != nil {
				return false, err
			}
			s.toDirect()
		} else {
			s.pump(c)
		}
	}
	return true, nil
}

// soon waits a moment for more from a program that is in the middle of writing
// much: the way back through the epoll loop costs more than that.
func (c *Capture) soon() bool {
	p := []unix.PollFd{{Fd: int32(c.pipe), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 1)
	return err == nil && n > 0
}

// move splices one chunk.
func (s *sink) move(c *Capture) (int64, error) {
	var out int
	var off int64
	want := int64(chunk)
	if s.ck != nil {
		out, off = c.sp.fd, c.sp.size
	} else {
		s.due(1)
		if s.fd < 0 {
			if err := s.openLog(); err != nil {
				return 0, err
			}
		}
		out, off = s.fd, s.size
		if s.t.MaxSize > 0 {
			want = min(want, s.t.MaxSize-s.size)
			if want <= 0 {
				want = readSize // one line longer than a file should be
			}
		}
		s.idx.mark(s.size, s.m.now(), false)
	}
	if c.wantsRelay() {
		c.makeRelay()
	}
	from := c.pipe
	if y := c.relay; y != nil {
		from = y.r
		if y.pending == 0 {
			if n, err := y.fill(c.pipe, int(want)); n <= 0 {
				if err != nil && !errors.Is(err, unix.EAGAIN) {
					err = &os.PathError{Op: "relay", Path: s.path, Err: err}
				}
				return 0, err
			}
		}
		want = min(want, y.pending)
	}
	for {
		var n int64
		var err error
		at := off
		if s.copying {
			n, err = copyChunk(from, int(min(want, 16<<10)), out, off)
		} else {
			n, err = unix.Splice(from, nil, out, &at, int(want), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EINVAL) && !s.copying:
			s.copying = true
			continue
		case errors.Is(err, unix.EAGAIN):
			return 0, err
		case err != nil:
			return 0, &os.PathError{Op: "write", Path: s.path, Err: err}
		}
		if s.ck != nil {
			c.sp.size += n
		} else {
			s.size += n
		}
		if c.relay != nil {
			c.relay.pending -= n
		}
		if n >= 60<<10 {
			c.widen()
		}
		return n, nil
	}
}

// copyChunk is for file systems without splice; a kill between the two calls
// can lose what it took.
func copyChunk(pipe, want, out int, off int64) (int64, error) {
	p := []unix.PollFd{{Fd: int32(pipe), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, 0); err != nil {
		return 0, err
	}
	if p[0].Revents == 0 {
		return 0, unix.EAGAIN
	}
	b := make([]byte, want)
	n, err := unix.Read(pipe, b)
	if err != nil {
		return 0, err
	}
	return int64(n), pwriteFull(out, b[:n], off)
}

// discard throws away what is in the pipe.
func (s *sink) discard(c *Capture) (int64, error) {
	null, err := s.m.null()
	if err != nil {
		return 0, err
	}
	total := int64(0)
	for y := c.relay; y != nil && y.pending > 0; {
		n, err := unix.Splice(y.r, nil, null, nil, int(y.pending), unix.SPLICE_F_NONBLOCK)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return total, err
		}
		y.pending -= n
		total += n
	}
	for total < turn {
		if c.tap != nil {
			b := make([]byte, readSize)
			n, err := unix.Read(c.pipe, b) // set to O_NONBLOCK by Lines
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				return total, nil
			case err != nil:
				return total, err
			case n == 0:
				c.eof = true
				return total, nil
			}
			c.tap.feed(b[:n])
			total += int64(n)
			continue
		}
		n, err := unix.Splice(c.pipe, nil, null, nil, chunk, unix.SPLICE_F_NONBLOCK)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return total, nil
		case err != nil:
			return total, err
		case n == 0:
			c.eof = true
			return total, nil
		}
		if n >= 60<<10 {
			c.widen()
		}
		total += n
	}
	return total, nil
}

// putMark tells in the log that output was lost there.
func (s *sink) putMark(c *Capture) error {
	t := c.tr
	if t == nil || t.unmarked == 0 {
		return nil
	}
	cause := "cannot write"
	var no unix.Errno
	if errors.As(t.err, &no) {
		cause = no.Error()
	}
	text := fmt.Sprintf("[remuda: %d bytes of output lost: %s]\n", t.unmarked, cause)
	if s.ck == nil {
		var b [1]byte
		if s.size > 0 {
			if _, err := preadFull(s.fd, b[:], s.size-1); err != nil {
				return err
			}
			if b[0] != '\n' {
				text = "\n" + text
			}
		}
		if err := s.put([]byte(text)); err != nil {
			return err
		}
	} else {
		if c.sp.size > s.ck.slots[c.sp.slot].pos {
			text = "\n" + text
		}
		if err := pwriteFull(c.sp.fd, []byte(text), c.sp.size); err != nil {
			_ = unix.Ftruncate(c.sp.fd, c.sp.size)
			return err
		}
		c.sp.size += int64(len(text))
	}
	t.unmarked = 0
	return nil
}

// transform writes the whole lines of c's spool into the log; last also the
// unfinished one.
func (s *sink) transform(c *Capture, last bool) error {
	bufs := s.m.buffers()
	defer s.m.release(bufs)
	sp := c.sp
	for {
		pos := s.ck.slots[sp.slot].pos
		have := sp.size - pos
		if have == 0 {
			break
		}
		in, err := bufs.fill(sp.fd, pos, have)
		if err != nil {
			return err
		}
		s.due(1) // never begin a batch in a full file
		if s.fd < 0 {
			if err := s.openLog(); err != nil {
				return err
			}
		}
		if s.ino != 0 && s.size == 0 {
			if err := s.commit(-1, 0, 0); err != nil {
				return err
			}
		}
		room := int64(batch)
		if s.t.MaxSize > 0 {
			room = min(room, s.t.MaxSize-s.size)
		}
		now := s.m.now()
		out, used := bufs.out[:0], 0
		for used < len(in) && (used == 0 || int64(len(out)) < room) {
			line, n, cut := nextLine(in[used:], MaxLine)
			if n == 0 {
				if !last || int64(used+len(in[used:])) < have {
					break
				}
				line, n = in[used:], len(in)-used
			}
			out = s.format(out, c.src, line, cut, now)
			c.saw(line)
			used += n
		}
		bufs.out = out
		if used == 0 {
			break
		}
		s.idx.mark(s.size, now, false)
		if err := pwriteFull(s.fd, out, s.size); err != nil {
			_ = unix.Ftruncate(s.fd, s.size)
			c.unsee()
			return &os.PathError{Op: "write", Path: s.path, Err: err}
		}
		if err := s.commit(sp.slot, pos+int64(used), s.size+int64(len(out))); err != nil {
			c.unsee()
			return err
		}
		c.seen()
	}
	return s.trimSpool(sp)
}
