package ipc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

const (
	// DefaultShared is from how many bytes on payloads travel in shared memory,
	// where no other bound is set.
	DefaultShared = 64 << 10

	// maxShared and maxSegments bound what the other side of a channel has
	// mapped here.
	maxShared   = 1 << 30
	maxSegments = 256
	// ownShared and ownSegments bound what this side makes for the other, buffers
	// too; what does not fit goes through the socket.
	ownShared   = 512 << 20
	ownSegments = 128
	// sharedIdle is how long a segment is kept that nothing uses.
	sharedIdle = 10 * time.Second

	segmentSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
)

// newSegment makes shared memory of n bytes whose size is sealed, so that whoever
// maps it can never touch what is not there.
func newSegment(n int) (b []byte, fd int, err error) {
	fd, err = unix.MemfdCreate("remuda-shared", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, -1, fmt.Errorf("ipc: make shared memory: %w", os.NewSyscallError("memfd_create", err))
	}
	if err = unix.Ftruncate(fd, int64(n)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, segmentSeals|unix.F_SEAL_SEAL)
	}
	if err == nil {
		b, err = unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, -1, fmt.Errorf("ipc: make %d bytes of shared memory: %w", n, err)
	}
	return b, fd, nil
}

// mapSegment maps what the other side has made, if that is safe: memory whose
// size cannot change, and of the kind whose pages cannot be taken away.
func mapSegment(f *os.File, n int) (b []byte, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%w: a segment: %w", ErrProtocol, err)
	}
	errCtl := rc.Control(func(p uintptr) {
		fd := int(p)
		var seals int
		if seals, err = unix.FcntlInt(p, unix.F_GET_SEALS, 0); err != nil || seals&segmentSeals != segmentSeals {
			err = errors.Join(errors.New("its size is not sealed"), err)
			return
		}
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err != nil || st.Size != int64(n) {
			err = errors.Join(fmt.Errorf("it has %d bytes and was announced with %d", st.Size, n), err)
			return
		}
		// Huge pages may run out, which is a SIGBUS.
		var fs unix.Statfs_t
		if err = unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
			err = errors.Join(errors.New("it is not of ordinary pages"), err)
			return
		}
		b, err = unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	})
	if err = errors.Join(err, errCtl); err != nil {
		return nil, fmt.Errorf("%w: a segment of shared memory: %w", ErrProtocol, err)
	}
	return b, nil
}

// block is shared memory that this side has made for the other.
type block struct {
	id     uint32
	b      []byte
	leased bool
	sent   bool // the other side has it in use
	used   time.Time
	buffer *Buffer // whose memory it is; nil: the shelf's own
}

// shelf is all of it, for one channel.
type shelf struct {
	w    *writer
	idle time.Duration

	mu      sync.Mutex
	segs    map[uint32]*block
	buffers map[*Buffer]*block
	bytes   int
	last    uint32
	timer   *time.Timer
	armed   bool
	closed  bool
}

// Lease is the right to put one message into shared memory. It ends by End,
// unless it went with an answer.
type Lease struct {
	s      *shelf
	g      *block
	off, n int
	buffer *Buffer
}

// Bytes is the memory, which is not cleared.
func (l *Lease) Bytes() []byte { return l.g.b[l.off : l.off+l.n : l.off+l.n] }

// within reports whether b lies in mem, and where.
func within(mem, b []byte) (off int, ok bool) {
	if len(b) == 0 || len(mem) == 0 {
		return 0, false
	}
	from, at := uintptr(unsafe.Pointer(&mem[0])), uintptr(unsafe.Pointer(&b[0]))
	if at < from || at-from > uintptr(len(mem)) || uintptr(len(b)) > uintptr(len(mem))-(at-from) {
		return 0, false
	}
	return int(at - from), true
}

// End gives the memory back. It may be called again, and for nil.
func (l *Lease) End() {
	if l == nil || l.g == nil {
		return
	}
	g := l.g
	l.g = nil
	if l.buffer != nil {
		l.buffer.unref()
		return
	}
	l.s.put(g)
}

// sizeFor rounds up, so that messages of about one size share segments.
func sizeFor(n int) int {
	step := max(1<<max(bits.Len(uint(n))-3, 0), 64<<10)
	return (n + step - 1) / step * step
}

// lease returns memory for n bytes, nil where there is none to be had.
func (s *shelf) lease(n int) *Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || n <= 0 || n > ownShared {
		return nil
	}
	g, size := s.free(n, 8*n), sizeFor(n)
	if g == nil && !s.room(size) {
		if g = s.free(n, maxShared); g == nil {
			s.trim(time.Time{})
		}
	}
	if g == nil && s.room(size) {
		b, fd, err := newSegment(size)
		if err != nil {
			return nil // it goes through the socket
		}
		if g = s.announce(b, fd); g == nil {
			_ = unix.Munmap(b)
		}
	}
	if g == nil {
		return nil
	}
	g.leased = true
	return &Lease{s: s, g: g, n: n}
}

func (s *shelf) room(n int) bool { return s.bytes+n <= ownShared && len(s.segs) < ownSegments }

// free finds the smallest segment that is free and of n to limit bytes.
func (s *shelf) free(n, limit int) (best *block) {
	for _, g := range s.segs {
		if !g.leased && g.buffer == nil && len(g.b) >= n && len(g.b) <= max(limit, 64<<10) && (best == nil || len(g.b) < len(best.b)) {
			best = g
		}
	}
	return best
}

// announce tells the other side of memory, and takes over fd. nil: it cannot.
func (s *shelf) announce(b []byte, fd int) *block {
	s.last++
	var space [HeaderSize + 8]byte
	head := binary.LittleEndian.AppendUint64(AppendHeader(space[:0], TypeSegment, s.last, 8), uint64(len(b)))
	if s.w.queueFDs(head, nil, []int{fd}) != nil {
		return nil
	}
	g := &block{id: s.last, b: b}
	s.segs[g.id] = g
	s.bytes += len(b)
	return g
}

// put takes back what was leased.
func (s *shelf) put(g *block) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g.leased, g.sent, g.used = false, false, time.Now()
	if s.closed {
		g.unmap()
		return
	}
	s.arm()
}

// unmap may be called again.
func (g *block) unmap() {
	if g.b != nil {
		_ = unix.Munmap(g.b)
		g.b = nil
	}
}

func (s *shelf) arm() {
	if s.armed {
		return
	}
	s.armed = true
	if s.timer == nil {
		s.timer = time.AfterFunc(s.idle, s.tidy)
	} else {
		s.timer.Reset(s.idle)
	}
}

// tidy gives back what was not used for some time.
func (s *shelf) tidy() {
	s.mu.Lock()
	s.armed = false
	if !s.closed && s.trim(time.Now().Add(-s.idle/2)) {
		s.arm()
	}
	s.mu.Unlock()
	s.w.flush(false)
}

// trim gives back what was last used before that time, or at all where it is
// zero, and reports whether anything is left for the next time.
func (s *shelf) trim(before time.Time) (left bool) {
	for _, g := range s.segs {
		switch {
		case g.leased || g.buffer != nil:
		case before.IsZero() || g.used.Before(before):
			s.forget(g)
			g.unmap()
		default:
			left = true
		}
	}
	return left
}

// forget tells the other side that a segment will not be used any more.
func (s *shelf) forget(g *block) {
	delete(s.segs, g.id)
	s.bytes -= len(g.b)
	var head [HeaderSize]byte
	_ = s.w.queue(AppendHeader(head[:0], TypeForget, g.id, 0), nil) // the channel has ended, or is about to
}

// released: the other side has no more use of what was sent in a segment.
func (s *shelf) released(id uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.segs[id]
	if g == nil || !g.sent {
		return fmt.Errorf("%w: RELEASE of segment %d, which is not in use", ErrProtocol, id)
	}
	g.leased, g.sent, g.used = false, false, time.Now()
	s.arm()
	return nil
}

// send marks a lease's segment as the other side's, until it says RELEASE.
func (s *shelf) send(l *Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.g.sent = true
	if s.closed {
		l.g.unmap()
	}
}

// close gives everything back that nobody in this process uses.
func (s *shelf) close() {
	s.mu.Lock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	var buffers []*Buffer
	for _, g := range s.segs {
		switch {
		case g.buffer != nil:
			buffers = append(buffers, g.buffer)
		case !g.leased || g.sent:
			g.unmap()
		}
	}
	s.segs, s.buffers, s.bytes = nil, nil, 0
	s.mu.Unlock()
	for _, b := range buffers {
		b.mu.Lock()
		delete(b.shelves, s)
		b.mu.Unlock()
	}
}

// share puts body into memory that it shares with the other side, or finds that
// it is there already, in buf. nil: it goes through the socket.
func (s *shelf) share(body []byte, buf *Buffer) *Lease {
	if buf != nil {
		if off, ok := within(buf.b, body); ok {
			if g := buf.ref(s); g != nil {
				return &Lease{s: s, g: g, off: off, n: len(body), buffer: buf}
			}
			return nil
		}
	}
	l := s.lease(len(body))
	if l != nil {
		copy(l.Bytes(), body)
	}
	return l
}

// appendShared appends the SHARED frame of a lease.
func appendShared(dst []byte, id uint32, l *Lease) []byte {
	if l == nil {
		return dst
	}
	dst = AppendHeader(dst, TypeShared, id, sharedSize)
	dst = binary.LittleEndian.AppendUint32(dst, l.g.id)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(l.off))
	return binary.LittleEndian.AppendUint64(dst, uint64(l.n))
}

const sharedSize = 20

// Buffer is memory that is shared with workers as it is: a task whose body lies
// in it costs no copy. Its methods may be called from any goroutine.
type Buffer struct {
	b  []byte
	fd int

	mu       sync.Mutex
	refs     int // the owner's, and one for each message under way
	released bool
	shelves  map[*shelf]struct{}
}

// NewBuffer makes a buffer of n bytes, all zero. The caller must Release it.
func NewBuffer(n int) (*Buffer, error) {
	if n <= 0 || n > ownShared {
		return nil, fmt.Errorf("ipc: a buffer of %d bytes: 1 to %d are possible", n, ownShared)
	}
	b, fd, err := newSegment(n)
	if err != nil {
		return nil, err
	}
	return &Buffer{b: b, fd: fd, refs: 1, shelves: make(map[*shelf]struct{})}, nil
}

// Bytes is the memory. It must not be changed while a task is under way whose
// body lies in it, and not be touched after Release.
func (b *Buffer) Bytes() []byte { return b.b }

// Release gives the buffer back. Its memory is gone when no task uses it any
// more.
func (b *Buffer) Release() {
	b.mu.Lock()
	done := b.released
	b.released = true
	b.mu.Unlock()
	if !done {
		b.unref()
	}
}

// ref makes sure that the other side of a channel knows the buffer.
func (b *Buffer) ref(s *shelf) *block {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.released {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	g := s.buffers[b]
	if g == nil {
		if !s.room(len(b.b)) {
			s.trim(time.Time{})
		}
		if !s.room(len(b.b)) {
			return nil
		}
		fd, err := unix.FcntlInt(uintptr(b.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil
		}
		if g = s.announce(b.b, fd); g == nil {
			return nil
		}
		g.buffer = b
		s.buffers[b] = g
		b.shelves[s] = struct{}{}
	}
	b.refs++
	return g
}

func (b *Buffer) unref() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refs--; b.refs > 0 {
		return
	}
	for s := range b.shelves {
		s.mu.Lock()
		if g := s.buffers[b]; g != nil {
			delete(s.buffers, b)
			s.forget(g)
		}
		s.mu.Unlock()
		s.w.flush(true)
	}
	_ = unix.Munmap(b.b)
	fdpass.Close([]int{b.fd})
}

// Shared is a payload that lies in memory which the other side has made, and may
// change at any time: whoever parses it copies it first.
type Shared struct {
	Bytes []byte

	v    *views
	m    *mapping
	tell bool // the other side waits to be told
}

// Release says that the bytes are not used any more; they must not be touched
// then. It may be called again, and for nil.
func (s *Shared) Release() {
	if s != nil && s.m != nil {
		m := s.m
		s.m = nil
		s.v.release(m, s.tell)
	}
}

// mapping is a segment of the other side's.
type mapping struct {
	id   uint32
	b    []byte
	uses int
	gone bool // forgotten: to be unmapped after the last use
}

// views are the segments of the other side.
type views struct {
	w *writer

	mu     sync.Mutex
	segs   map[uint32]*mapping
	n      int // with those that are forgotten and in use
	bytes  int
	closed bool
}

// add maps the segment that a SEGMENT frame announces.
func (v *views) add(id uint32, payload []byte, in *inbox) error {
	if len(payload) != 8 {
		return fmt.Errorf("%w: SEGMENT of %d bytes", ErrProtocol, len(payload))
	}
	size := binary.LittleEndian.Uint64(payload)
	files, err := in.take(1)
	if err != nil {
		return err
	}
	defer closeFiles(files)
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.closed:
		return os.ErrClosed
	case v.segs[id] != nil:
		return fmt.Errorf("%w: a second SEGMENT %d", ErrProtocol, id)
	case size == 0 || size > uint64(maxShared-v.bytes) || v.n == maxSegments:
		return fmt.Errorf("%w: a SEGMENT of %d bytes, beside %d of %d", ErrTooLarge, size, v.n, v.bytes)
	}
	b, err := mapSegment(files[0], int(size))
	if err != nil {
		return err
	}
	if v.segs == nil {
		v.segs = make(map[uint32]*mapping)
	}
	v.segs[id] = &mapping{id: id, b: b}
	v.n++
	v.bytes += len(b)
	return nil
}

// use returns what a SHARED frame says.
func (v *views) use(payload []byte, limit int) (*Shared, error) {
	if len(payload) != sharedSize {
		return nil, fmt.Errorf("%w: SHARED of %d bytes", ErrProtocol, len(payload))
	}
	id := binary.LittleEndian.Uint32(payload)
	off, n := binary.LittleEndian.Uint64(payload[4:]), binary.LittleEndian.Uint64(payload[12:])
	v.mu.Lock()
	defer v.mu.Unlock()
	m := v.segs[id]
	switch {
	case m == nil:
		return nil, fmt.Errorf("%w: SHARED in segment %d, which is not known", ErrProtocol, id)
	case off > uint64(len(m.b)) || n > uint64(len(m.b))-off:
		return nil, fmt.Errorf("%w: SHARED beyond the end of its segment", ErrProtocol)
	case n > uint64(limit):
		return nil, fmt.Errorf("%w: SHARED of %d bytes, where %d are allowed", ErrTooLarge, n, limit)
	}
	m.uses++
	return &Shared{Bytes: m.b[off : off+n : off+n], v: v, m: m}, nil
}

func (v *views) release(m *mapping, tell bool) {
	v.mu.Lock()
	m.uses--
	if m.gone && m.uses == 0 {
		v.unmap(m)
	}
	tell = tell && !v.closed
	v.mu.Unlock()
	if tell {
		var head [HeaderSize]byte
		if v.w.queue(AppendHeader(head[:0], TypeRelease, m.id, 0), nil) == nil {
			v.w.flush(false)
		}
	}
}

func (v *views) forget(id uint32) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	m := v.segs[id]
	if m == nil {
		return fmt.Errorf("%w: FORGET of segment %d, which is not known", ErrProtocol, id)
	}
	delete(v.segs, id)
	v.drop(m)
	return nil
}

func (v *views) drop(m *mapping) {
	if m.gone = true; m.uses == 0 {
		v.unmap(m)
	}
}

func (v *views) unmap(m *mapping) {
	v.n--
	v.bytes -= len(m.b)
	_ = unix.Munmap(m.b)
	m.b = nil
}

func (v *views) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	for id, m := range v.segs {
		delete(v.segs, id)
		v.drop(m)
	}
}
