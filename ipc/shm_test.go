package ipc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/test/leak"
)

// mapped is how many segments this process has mapped.
func mapped(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "remuda-shared")
}

// memfd makes a segment as a worker may.
func memfd(t testing.TB, size int64, flags, seals int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("remuda-shared", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|flags)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	if seals != 0 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func segmentFrame(id uint32, size uint64) []byte {
	return frame(TypeSegment, id, binary.LittleEndian.AppendUint64(nil, size)...)
}

func sharedFrame(id, segment uint32, off, n uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, segment)
	b = binary.LittleEndian.AppendUint64(b, off)
	return frame(TypeShared, id, binary.LittleEndian.AppendUint64(b, n)...)
}

// What a hostile worker can do with shared memory.
func TestHostileShared(t *testing.T) {
	const size = 64 << 10
	result := frame(TypeResult, 1)
	with := func(e *enemy, fd int, parts ...[]byte) {
		e.sendFDs([]int{fd}, parts...)
		_ = unix.Close(fd)
	}
	good := func(e *enemy) { with(e, memfd(e.t, size, 0, segmentSeals), segmentFrame(7, size)) }
	for name, attack := range map[string]func(*enemy){
		"not sealed":         func(e *enemy) { with(e, memfd(e.t, size, 0, 0), segmentFrame(1, size)) },
		"may shrink":         func(e *enemy) { with(e, memfd(e.t, size, 0, unix.F_SEAL_GROW), segmentFrame(1, size)) },
		"may grow":           func(e *enemy) { with(e, memfd(e.t, size, 0, unix.F_SEAL_SHRINK), segmentFrame(1, size)) },
		"too small":          func(e *enemy) { with(e, memfd(e.t, size-1, 0, segmentSeals), segmentFrame(1, size)) },
		"too large":          func(e *enemy) { with(e, memfd(e.t, size+1, 0, segmentSeals), segmentFrame(1, size)) },
		"empty":              func(e *enemy) { with(e, memfd(e.t, 0, 0, segmentSeals), segmentFrame(1, 0)) },
		"may not be written": func(e *enemy) { with(e, memfd(e.t, size, 0, segmentSeals|unix.F_SEAL_WRITE), segmentFrame(1, size)) },
		"no memory":          func(e *enemy) { e.send(1, segmentFrame(1, size)) },
		"no descriptor":      func(e *enemy) { e.send(0, segmentFrame(1, size)) },
		"two descriptors":    func(e *enemy) { e.send(2, segmentFrame(1, size)) },
		"a huge one":         func(e *enemy) { with(e, memfd(e.t, maxShared+1, 0, segmentSeals), segmentFrame(1, maxShared+1)) },
		"a size of 2^64-1":   func(e *enemy) { with(e, memfd(e.t, size, 0, segmentSeals), segmentFrame(1, 1<<64-1)) },
		"many": func(e *enemy) {
			for i := range maxSegments + 1 {
				with(e, memfd(e.t, 4096, 0, segmentSeals), segmentFrame(uint32(i), 4096))
			}
		},
		"twice":           func(e *enemy) { good(e); good(e) },
		"short":           func(e *enemy) { e.send(1, frame(TypeSegment, 1, 1)) },
		"unknown segment": func(e *enemy) { e.send(0, sharedFrame(1, 1, 0, 10), result) },
		"beyond":          func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 10, size), result) },
		"far beyond":      func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 1<<63, 1), result) },
		"overflow":        func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, size, 1<<64-size), result) },
		"too much":        func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 0, 60<<10), result) },
		"short shared":    func(e *enemy) { good(e); e.send(0, frame(TypeShared, 1, 1), result) },
		"both":            func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 0, 10), frame(TypeResult, 1, 1)) },
		"twice shared":    func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 0, 9), sharedFrame(1, 7, 0, 9), result) },
		"other id":        func(e *enemy) { good(e); e.send(0, sharedFrame(2, 7, 0, 10), result) },
		"no task":         func(e *enemy) { good(e); e.send(0, sharedFrame(2, 7, 0, 10), frame(TypeResult, 2)) },
		"progress":        func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 0, 10), frame(TypeProgress, 1)) },
		"a task":          func(e *enemy) { good(e); e.send(0, sharedFrame(1, 7, 0, 10), frame(TypeTask, 1, 0, 0, 0, 0, 0, 0)) },
		"forget unknown":  func(e *enemy) { e.send(0, frame(TypeForget, 1)) },
		"forget twice":    func(e *enemy) { good(e); e.send(0, frame(TypeForget, 7), frame(TypeForget, 7)) },
		"forgotten":       func(e *enemy) { good(e); e.send(0, frame(TypeForget, 7), sharedFrame(1, 7, 0, 10), result) },
		"release unknown": func(e *enemy) { e.send(0, frame(TypeRelease, 1)) },
	} {
		if err := fight(t, Options{MaxMessage: 50 << 10}, attack); !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Huge pages may run out under whoever reads: never mapped.
	if fd, err := unix.MemfdCreate("remuda-shared", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_HUGETLB); err == nil {
		_ = unix.Ftruncate(fd, 2<<20)
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, segmentSeals)
		if err := fight(t, Options{}, func(e *enemy) { with(e, fd, segmentFrame(1, 2<<20)) }); !errors.Is(err, ErrProtocol) {
			t.Errorf("huge pages: %v", err)
		}
	}
	// And the way it should be; memory that is changed and punched meanwhile.
	err := fight(t, Options{}, func(e *enemy) {
		fd := memfd(e.t, size, 0, segmentSeals)
		e.sendFDs([]int{fd}, segmentFrame(7, size))
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 100 {
				_ = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size)
				_, _ = unix.Pwrite(fd, bytes.Repeat([]byte("x"), 5000), 100)
			}
		})
		e.send(0, sharedFrame(1, 7, 0, size), result)
		wg.Wait()
		_ = unix.Close(fd)
	})
	if err != nil {
		t.Error(err)
	}
	if n := mapped(t); n != 0 {
		t.Errorf("%d segments are left", n)
	}
}

// The other way: RELEASE of what is not in use.
func TestHostileRelease(t *testing.T) {
	a, b := pair(t)
	w, err := NewChannel(a, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p, err := NewChannel(b, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	w.SetPeer(Hello{MaxFrame: 1 << 20, Shared: 1})
	l := w.Lease(10)
	if l == nil {
		t.Fatal("no lease")
	}
	if err := p.Send(TypeRelease, 1, nil); err != nil { // held, not sent
		t.Fatal(err)
	}
	if _, _, _, err := w.Receive(); !errors.Is(err, ErrProtocol) {
		t.Errorf("RELEASE of what was not sent: %v", err)
	}
	l.End()
	l.End()
}

// Segments are used again, and given back when they are idle.
func TestSegmentsIdle(t *testing.T) {
	a, b := pair(t)
	w, err := NewChannel(a, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewChannel(b, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w.own.idle = 20 * time.Millisecond
	w.SetPeer(Hello{MaxFrame: 1 << 30, Shared: 1000})
	p.SetPeer(Hello{MaxFrame: 1 << 30, Shared: 1000})
	before := mapped(t)
	send := func(id uint32, n int) {
		t.Helper()
		if err := w.SendResult(id, bytes.Repeat([]byte{byte(id)}, n), Answer{}); err != nil {
			t.Fatal(err)
		}
		for {
			f, _, _, err := p.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if f.Type != TypeResult {
				continue
			}
			if f.Shared == nil || len(f.Shared.Bytes) != n || f.Shared.Bytes[n-1] != byte(id) {
				t.Fatalf("result %d of %d bytes: %+v", id, n, f.Shared)
			}
			f.Shared.Release()
			break
		}
		if f, _, _, err := w.Receive(); err != nil || f.Type != TypeRelease {
			t.Fatal(f.Type, err)
		}
	}
	for i := range 50 {
		send(uint32(i), 100_000-i)
	}
	send(51, 4<<20)
	if n := mapped(t) - before; n > 2*(1+2) { // but for what went idle between
		t.Errorf("%d mappings of two segments", n)
	}
	for f := (Frame{}); mapped(t) > before; {
		if f, _, _, err = p.Receive(); err != nil || f.Type != TypeForget {
			t.Fatal(f.Type, err)
		}
	}
	send(52, 100_000)
	w.Close()
	p.Close()
	if n := mapped(t); n != before {
		t.Errorf("%d mappings, %d before", n, before)
	}
	if w.Lease(10) != nil {
		t.Error("a lease on a channel that has ended")
	}
}

// What does not fit goes through the socket.
func TestSegmentsBound(t *testing.T) {
	s := &shelf{w: &writer{limit: 1 << 30}, idle: time.Hour, segs: make(map[uint32]*block), buffers: make(map[*Buffer]*block)}
	s.w.room.L = &s.w.mu
	before := leak.Descriptors(t)
	var leases []*Lease
	for l := s.lease(60 << 20); l != nil; l = s.lease(60 << 20) {
		leases = append(leases, l)
	}
	if len(leases) != 8 {
		t.Errorf("%d leases of 60 MiB", len(leases))
	}
	buf, err := NewBuffer(100 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if s.share(buf.Bytes(), buf) != nil {
		t.Error("a buffer that is too much was shared")
	}
	leases[0].End()
	leases[1].End()
	if l := s.lease(1000); l == nil {
		t.Error("no lease of what is free")
	} else {
		l.End()
	}
	l := s.share(buf.Bytes()[50:60], buf) // those that are free make room
	if l == nil || l.off != 50 || l.n != 10 {
		t.Fatalf("the buffer was not shared: %+v", l)
	}
	buf.Release()
	if mapped(t) == 0 {
		t.Error("the buffer is gone with a task in it")
	}
	if s.share(buf.Bytes()[:1], buf) != nil {
		t.Error("a released buffer was shared")
	}
	for _, l := range leases[2:] {
		l.End()
	}
	s.close()
	l.End()
	s.w.fail(ErrClosed)
	if n := mapped(t); n != 0 {
		t.Errorf("%d segments are left", n)
	}
	leak.Settled(t, before)
}
