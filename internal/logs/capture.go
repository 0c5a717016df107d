package logs

import (
	"bytes"
	"context"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 2 * time.Second
	// stallMax is how long a program may wait for a full pipe before its
	// output is thrown away.
	stallMax = time.Second
	// keepLines lines of keepBytes are kept of a run whose lines are rewritten.
	keepLines = 16
	keepBytes = 512
	// cutMark ends a piece of a longer line in logs that are not JSON.
	cutMark = " [remuda: line goes on]"
)

// Capture is the taking of one stream of one run.
type Capture struct {
	m       *Manager
	s       *sink
	src     Source
	id      int32
	pipe    int
	pipeIno uint64
	relay   *relay // nil while it has none; guarded by s.mu, as the next two
	noRelay bool   // it was asked for
	relayed bool   // whoever gave it must be told at the end
	queued  bool   // guarded by the writer's mutex

	// guarded by s.mu
	adopted bool
	begun   bool
	closed  bool
	eof     bool
	wide    bool
	start   int64  // where the run begins in the log with inode ino; < 0: so far before it
	end     int64  // where it ended; -1 while it lives
	ino     uint64 // 0: none yet
	sp      *spool
	tr      *trouble
	stats   Stats
	tap     *tap
	ring    *ring
	notes   []Trouble
}

// trouble is kept while writing fails.
type trouble struct {
	err      error
	wait     time.Duration
	next     time.Time // when to try again
	full     time.Time // since when the pipe is full; zero: it is not
	dropping bool
	unmarked int64 // bytes lost that the log does not tell of yet
	told     time.Time
	timer    *time.Timer
}

// Source returns the source given to Attach.
func (c *Capture) Source() Source { return c.src }

// Path returns the file the output goes to, "" where it is discarded.
func (c *Capture) Path() string { return c.s.t.Path }

// Stats tells what was taken so far.
func (c *Capture) Stats() Stats {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	st := c.stats
	st.EOF, st.Direct = c.eof, c.s.ck == nil
	if c.tr != nil {
		st.Err = c.tr.err
	}
	return st
}

func (c *Capture) took(n int64, now time.Time) {
	c.stats.Bytes += n
	c.stats.Last = now
}

// widen makes a pipe that is seen full larger, so that each turn moves more.
// The kernel refuses where the user has too many; then it stays as it is.
func (c *Capture) widen() {
	if !c.wide {
		c.wide = true
		_, _ = unix.FcntlInt(uintptr(c.pipe), unix.F_SETPIPE_SZ, pipeSize)
	}
}

// handle is one turn of c, by its writer.
func (c *Capture) handle() {
	s := c.s
	s.mu.Lock()
	if c.closed || c.m.isClosed() {
		s.mu.Unlock()
		return
	}
	now := time.Now()
	if t := c.tr; t != nil && now.Before(t.next) {
		if t.dropping {
			c.drop()
			t.timer.Reset(min(backoffMin, t.next.Sub(now)))
		}
	} else if more, err := s.take(c); err != nil {
		c.fail(err)
	} else {
		c.recovered()
		switch {
		case more:
			c.m.enqueue(c)
		case !c.eof:
			c.m.arm(c)
		}
	}
	c.unlock()
}

// unlock releases the sink and then tells what there is to tell.
func (c *Capture) unlock() {
	notes, tap := c.notes, c.tap
	c.notes = nil
	c.s.mu.Unlock()
	if c.m.o.OnTrouble != nil {
		for _, n := range notes {
			c.m.o.OnTrouble(n)
		}
	}
	if tap != nil {
		tap.deliver()
	}
}

func (c *Capture) tell(err error) {
	c.notes = append(c.notes, Trouble{Source: c.src, Path: c.s.path, Err: err, Lost: c.stats.Lost})
}

// fail notes that writing failed and has it tried again.
func (c *Capture) fail(err error) {
	now := time.Now()
	t := c.tr
	if t == nil {
		t = &trouble{wait: backoffMin / 2}
		t.timer = time.AfterFunc(time.Hour, func() { c.m.enqueue(c) })
		c.tr = t
		t.err = err
		c.tell(err)
		t.told = now
	}
	t.err = err
	t.wait = min(2*t.wait, backoffMax)
	t.next = now.Add(t.wait)
	switch {
	case t.dropping:
		c.drop()
	case !c.full():
		t.full = time.Time{}
	default:
		c.widen()
		switch {
		case !c.full():
		case t.full.IsZero():
			t.full = now
		case now.Sub(t.full) > stallMax:
			t.dropping = true
			c.drop()
		}
	}
	wait := t.wait
	if t.dropping || !t.full.IsZero() {
		wait = backoffMin
		if !t.dropping {
			t.next = now.Add(wait)
		}
	}
	t.timer.Reset(wait)
}

func (c *Capture) recovered() {
	if t := c.tr; t != nil {
		t.timer.Stop()
		c.tr = nil
		c.tell(nil)
	}
}

// full says whether a writer of the pipe would have to wait.
func (c *Capture) full() bool {
	// Only a writing end can tell for sure: a pipe's room is counted in pages
	// that may be filled partly.
	if fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(c.pipe), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		defer unix.Close(fd)
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(p, 0)
		return err == nil && n == 0
	}
	size, err := unix.FcntlInt(uintptr(c.pipe), unix.F_GETPIPE_SZ, 0)
	return err == nil && c.waiting() > int64(size)*7/8
}

// nothing says that the pipe is empty, and notes whether for good.
func (c *Capture) nothing() bool {
	if c.relay != nil && c.relay.pending > 0 || c.waiting() > 0 {
		return false
	}
	p := []unix.PollFd{{Fd: int32(c.pipe), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, 0); err != nil || p[0].Revents&unix.POLLIN != 0 {
		return false
	}
	c.eof = p[0].Revents&unix.POLLHUP != 0
	return true
}

func (c *Capture) waiting() int64 {
	n, err := unix.IoctlGetInt(c.pipe, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return int64(n)
}

// drop throws away what is in the pipe, once it is half full.
func (c *Capture) drop() {
	size, err := unix.FcntlInt(uintptr(c.pipe), unix.F_GETPIPE_SZ, 0)
	if err == nil && c.waiting() < int64(size)/2 && !c.full() {
		return
	}
	c.dropAll()
}

func (c *Capture) dropAll() {
	tap := c.tap
	c.tap = nil
	n, _ := c.s.discard(c)
	c.tap = tap
	if n == 0 {
		return
	}
	c.stats.Lost += n
	if c.tr == nil {
		return
	}
	c.tr.unmarked += n
	if now := time.Now(); now.Sub(c.tr.told) >= time.Second {
		c.tr.told = now
		c.tell(c.tr.err)
	}
}

// Finish ends the capture when the run is over: what is in the pipe now goes
// into the log, an unfinished line is ended, the pipe is closed. It does not
// wait for processes that still hold the pipe. Where the log cannot be
// written it tries until ctx ends; what is left then is counted as lost, and
// the error says why. Only the first call does something.
func (c *Capture) Finish(ctx context.Context) error {
	s := c.s
	s.mu.Lock()
	if c.closed {
		s.mu.Unlock()
		return nil
	}
	c.m.forget(c)
	var err error
	for {
		if _, err = s.take(c); err == nil {
			if err = s.endRun(c); err == nil {
				break
			}
		}
		c.fail(err)
		c.tr.timer.Stop()
		wait := c.tr.wait
		c.unlock()
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-c.m.stop:
		}
		timer.Stop()
		s.mu.Lock()
		if c.closed {
			s.mu.Unlock()
			return nil
		}
		if ctx.Err() != nil || c.m.isClosed() {
			break
		}
	}
	if err != nil && c.m.isClosed() {
		s.mu.Unlock()
		return errClosed // Close takes care of the rest
	}
	if err != nil {
		c.dropAll()
		c.tell(err)
	} else {
		c.recovered()
	}
	if c.tr != nil {
		c.tr.timer.Stop()
	}
	c.end = s.size
	if s.fd < 0 && c.begun && s.ck == nil {
		c.end = -1
	}
	c.close()
	s.detach(c)
	relayed := c.relayed
	c.unlock()
	if relayed && c.m.o.Unrelay != nil {
		c.m.o.Unrelay(c.src, c.pipeIno)
	}
	return err
}

func (c *Capture) close() {
	if !c.closed {
		c.closed = true
		c.closeSpool()
		_ = unix.Close(c.pipe)
		if c.relay != nil {
			c.relay.close()
		}
	}
}

// endRun ends an unfinished line.
func (s *sink) endRun(c *Capture) error {
	if s.t.Path == "" {
		if c.tap != nil {
			c.tap.end()
		}
		return nil
	}
	if !c.begun && !c.adopted && (c.tr == nil || c.tr.unmarked == 0) {
		return nil
	}
	if err := s.ready(c); err != nil {
		return err
	}
	if err := s.putMark(c); err != nil {
		return err
	}
	if s.ck == nil {
		if err := s.endLine(); err != nil {
			return err
		}
		s.pump(c)
		return nil
	}
	if err := s.transform(c, true); err != nil {
		return err
	}
	return s.freeSlot(c.sp.slot)
}

// detach removes c, and the sink with the last capture.
func (s *sink) detach(c *Capture) {
	for i, x := range s.caps {
		if x == c {
			s.caps = append(s.caps[:i], s.caps[i+1:]...)
			break
		}
	}
	if len(s.caps) > 0 {
		s.toDirect()
		return
	}
	if s.ck != nil {
		empty := true
		for _, x := range s.ck.slots {
			empty = empty && x.pipe == 0
		}
		if empty && s.fd >= 0 {
			// Whatever is in the log is there for good.
			_ = unix.Unlink(s.state(".ckpt"))
		}
	}
	s.closeAll()
	s.dead = true
	s.m.drop(s)
}

// ring keeps the last lines of a run.
type ring struct {
	lines [keepLines][]byte
	n     int // lines so far
	done  int // of these, lines that are in the log
	tap   []string
}

// saw takes a line that is about to be written.
func (c *Capture) saw(line []byte) {
	if c.ring == nil {
		c.ring = &ring{}
	}
	r := c.ring
	at := &r.lines[r.n%keepLines]
	*at = append((*at)[:0], line[:min(len(line), keepBytes)]...)
	r.n++
	if c.tap != nil {
		r.tap = append(r.tap, text(line))
	}
}

func (c *Capture) seen() {
	c.ring.done = c.ring.n
	if c.tap != nil {
		c.tap.add(c.ring.tap...)
	}
	c.ring.tap = nil
}

func (c *Capture) unsee() { c.ring.n, c.ring.tap = c.ring.done, nil }

func (r *ring) last(n int) []string {
	var out []string
	for i := max(0, r.done-min(n, keepLines)); i < r.done; i++ {
		out = append(out, text(r.lines[i%keepLines]))
	}
	return out
}

// Tail returns the last n lines of this run, oldest first: of an adopted run
// in a shared log, and of very long lines, perhaps less.
func (c *Capture) Tail(n int) []string {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if n <= 0 {
		return nil
	}
	if c.ring != nil {
		return c.ring.last(n)
	}
	if s.t.Path == "" {
		return nil
	}
	if c.adopted && !c.begun && !c.closed {
		if s.ready(c) != nil || s.ck != nil {
			return nil
		}
	}
	fd, err := openFile(s.path, unix.O_RDONLY)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || c.ino != st.Ino {
		return nil
	}
	end := st.Size
	if c.end >= 0 {
		end = min(end, c.end)
	}
	if c.start >= 0 {
		return tailOf(fd, max(c.start, end-MaxLine), end, n)
	}
	out := tailOf(fd, max(0, end-MaxLine), end, n)
	if len(out) >= n || end >= MaxLine || end < st.Size {
		return out
	}
	// The run began before the last rotation. How many of the lines before
	// are its own, their lengths tell.
	out = out[:0]
	left := end - c.start
	for r, err := range Read(context.Background(), Query{Files: []QueryFile{{Path: s.path}}, Lines: n}) {
		if err != nil {
			return out
		}
		out = append(out, r.Text)
	}
	for i := len(out) - 1; i >= 0; i-- {
		if left -= int64(len(out[i])); left < 0 {
			return out[i+1:]
		}
		left-- // the newline, which the last line need not have yet
	}
	return out
}

// tailOf returns the last n lines of the file's part from lo to end.
func tailOf(fd int, lo, end int64, n int) []string {
	if lo >= end {
		return nil
	}
	b := make([]byte, min(end-lo, 8192))
	for {
		k, err := preadFull(fd, b, end-int64(len(b)))
		if err != nil {
			return nil
		}
		if int64(k) == end-lo || bytes.Count(b, []byte{'\n'}) > n {
			break
		}
		b = make([]byte, min(end-lo, int64(4*len(b))))
	}
	lines := bytes.Split(bytes.TrimSuffix(b, []byte{'\n'}), []byte{'\n'})
	var out []string
	for _, l := range lines[max(0, len(lines)-n):] {
		out = append(out, text(l))
	}
	return out
}

// tap hands lines to a function outside of all locks.
type tap struct {
	off  int64 // direct: what is before it in the log was seen
	part []byte
	f    func(string)
	gone atomic.Bool
	run  sync.Mutex // held by who calls f
	mu   sync.Mutex
	q    []string
}

func (t *tap) add(lines ...string) {
	t.mu.Lock()
	t.q = append(t.q, lines...)
	t.mu.Unlock()
}

// feed takes bytes and adds the lines in them.
func (t *tap) feed(b []byte) {
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			t.part = append(t.part, b...)
			if len(t.part) >= MaxLine {
				t.end()
			}
			return
		}
		if len(t.part) > 0 {
			t.part = append(t.part, b[:i]...)
			t.add(text(t.part))
			t.part = nil
		} else {
			t.add(text(b[:i]))
		}
		b = b[i+1:]
	}
}

func (t *tap) end() {
	if len(t.part) > 0 {
		t.add(text(t.part))
		t.part = nil
	}
}

// deliver calls f for what is queued. Only one goroutine does so; another
// that comes meanwhile leaves its lines to it.
func (t *tap) deliver() {
	for {
		if !t.run.TryLock() {
			return
		}
		for {
			t.mu.Lock()
			q := t.q
			t.q = nil
			t.mu.Unlock()
			if len(q) == 0 {
				break
			}
			for _, l := range q {
				if t.gone.Load() {
					break
				}
				t.f(l)
			}
		}
		t.run.Unlock()
		t.mu.Lock()
		left := len(t.q)
		t.mu.Unlock()
		if left == 0 {
			return
		}
	}
}

// pump reads back for the tap what was spliced into the log.
func (s *sink) pump(c *Capture) {
	t := c.tap
	if t == nil || s.fd < 0 || !c.begun {
		return
	}
	if t.gone.Load() {
		c.tap = nil
		return
	}
	b := make([]byte, readSize)
	for at := t.off + int64(len(t.part)); at < s.size; {
		k := min(int64(len(b)), s.size-at)
		if _, err := preadFull(s.fd, b[:k], at); err != nil {
			return
		}
		t.feed(b[:k])
		at += k
		t.off = at - int64(len(t.part))
	}
}

// Lines calls f with each line of this run from its attachment on (of an
// adopted run in a log of its own: from the run's beginning, where that is
// still in the file), once each and in order, also with the last one that has
// no newline when the run is finished. It costs a second look at the bytes
// while it lasts. f is called by one goroutine at a time and must not block;
// it may call cancel. Lines replaces an earlier f.
func (c *Capture) Lines(f func(line string)) (cancel func()) {
	s := c.s
	s.mu.Lock()
	if c.tap != nil {
		c.tap.gone.Store(true)
	}
	t := &tap{f: f, off: max(0, c.start)}
	c.tap = t
	if !c.closed {
		switch {
		case s.t.Path == "":
			_ = unix.SetNonblock(c.pipe, true)
		case c.ring != nil:
			t.add(c.ring.last(keepLines)...)
		case c.adopted && !c.begun:
			if s.ready(c) == nil && s.ck == nil {
				t.off = max(0, c.start)
				s.pump(c)
			}
		default:
			if s.fd < 0 && c.begun {
				_ = s.ready(c)
			}
			if s.ck == nil {
				s.pump(c)
			}
		}
	}
	c.unlock()
	return func() {
		t.gone.Store(true)
		s.mu.Lock()
		if c.tap == t {
			c.tap = nil
		}
		s.mu.Unlock()
	}
}

// text makes a line what a reader is given.
func text(b []byte) string {
	if utf8.Valid(b) {
		return string(b)
	}
	return string(bytes.ToValidUTF8(b, []byte("\uFFFD")))
}

// nextLine returns the first line of b and its length with its newline: 0
// where none ends in b. A line longer than limit (≥ MaxLine) comes in pieces
// (cut).
func nextLine(b []byte, limit int) (line []byte, n int, cut bool) {
	if i := bytes.IndexByte(b[:min(len(b), limit+1)], '\n'); i >= 0 {
		return b[:i], i + 1, false
	}
	if len(b) <= limit {
		return nil, 0, false
	}
	n = MaxLine
	for k := 1; k <= utf8.UTFMax && k < n; k++ { // do not split a character
		if r := b[n-k]; utf8.RuneStart(r) {
			if !utf8.FullRune(b[n-k : n]) {
				n -= k
			}
			break
		}
	}
	return b[:n], n, true
}

// format appends a line in the sink's form.
func (s *sink) format(out []byte, src Source, line []byte, cut bool, now time.Time) []byte {
	if s.t.JSON {
		out = append(out, `{"time":"`...)
		out = now.AppendFormat(out, time.RFC3339Nano)
		out = append(out, `","app":`...)
		out = appendJSON(out, []byte(src.App))
		out = append(out, `,"id":`...)
		out = strconv.AppendInt(out, int64(src.ID), 10)
		out = append(out, `,"stream":`...)
		out = appendJSON(out, []byte(src.Stream))
		out = append(out, `,"text":`...)
		out = appendJSON(out, line)
		if cut {
			out = append(out, `,"cut":true`...)
		}
		return append(out, "}\n"...)
	}
	if s.t.TimeFormat != "" {
		out = now.AppendFormat(out, s.t.TimeFormat)
		out = append(out, ": "...)
	}
	out = append(out, line...)
	if cut {
		out = append(out, cutMark...)
	}
	return append(out, '\n')
}

func appendJSON(out, b []byte) []byte {
	const hex = "0123456789abcdef"
	out = append(out, '"')
	for i := 0; i < len(b); {
		c := b[i]
		switch {
		case c == '"' || c == '\\':
			out = append(out, '\\', c)
		case c == '\n':
			out = append(out, '\\', 'n')
		case c == '\t':
			out = append(out, '\\', 't')
		case c == '\r':
			out = append(out, '\\', 'r')
		case c < 0x20 || c == 0x7f:
			out = append(out, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		case c < utf8.RuneSelf:
			out = append(out, c)
		default:
			r, n := utf8.DecodeRune(b[i:])
			if r == utf8.RuneError && n == 1 {
				out = append(out, "\uFFFD"...)
			} else {
				out = append(out, b[i:i+n]...)
			}
			i += n
			continue
		}
		i++
	}
	return append(out, '"')
}

var errClosed = errors.New("the log manager is closed")
