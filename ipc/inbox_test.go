package ipc

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/test/leak"
)

// Messages with and without descriptors from many goroutines, to a reader that
// is slow at first: each one's arrive with it.
func TestWriterPassesDescriptors(t *testing.T) {
	before := leak.Descriptors(t)
	a, b := pair(t)
	sa, sb := sock(t, a), sock(t, b)
	w, in := newWriter(sa, 0), newInbox(sb)
	const writers, each = 4, 40
	var wg sync.WaitGroup
	for g := range writers {
		wg.Go(func() {
			for i := range each {
				var fds []int
				n := 0
				if i%2 == 0 {
					n = 1 + i%3
				}
				for range n {
					fd, err := unix.MemfdCreate("", unix.MFD_CLOEXEC)
					if err != nil {
						t.Error(err)
						return
					}
					if err := unix.Ftruncate(fd, int64(g<<16|i)+1); err != nil {
						t.Error(err)
					}
					fds = append(fds, fd)
				}
				body := bytes.Repeat([]byte{1}, []int{0, 100, 3000, 40 << 10}[i%4])
				head := AppendHeader(nil, Type(128+n), uint32(g<<16|i), len(body))
				if err := w.queueFDs(head, body, fds); err != nil {
					t.Error(err)
				}
				w.flush(i%5 == 0)
			}
		})
	}
	r := frameReader{r: in, limit: DefaultMaxFrame}
	for range writers * each {
		f, _, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		files, err := in.take(int(f.Type - 128))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if st, err := file.Stat(); err != nil || st.Size() != int64(f.ID)+1 {
				t.Errorf("message %x has the descriptor of %x, %v", f.ID, st.Size()-1, err)
			}
		}
		closeFiles(files)
	}
	wg.Wait()
	if in.waiting() != 0 {
		t.Error("descriptors are left")
	}
	// What can no longer be sent is closed.
	for range 3 {
		fds, err := fdpass.Dup([]*os.File{a})
		if err != nil {
			t.Fatal(err)
		}
		w.hold()
		_ = w.queueFDs([]byte("x"), nil, fds)
		w.fail(ErrClosed)
	}
	sa.Close()
	sb.Close()
	in.close()
	leak.Settled(t, before)
}

func TestInboxRefuses(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := leak.Descriptors(t)
	for _, c := range []struct {
		name  string
		fds   []int // of each byte
		bytes string
		want  error
	}{
		{"too many at once", []int{17}, "xxxxxxxxxxxxx", ErrProtocol},
		{"too many in a row", []int{16, 16, 1}, "x", ErrProtocol},
		{"stray", []int{1}, string(AppendHeader(nil, 200, 0, 0)), ErrProtocol},
		{"stray at the end", []int{3}, "x", io.ErrUnexpectedEOF},
	} {
		a, b := pair(t)
		ch, err := NewChannel(b, ChannelOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range c.fds {
			fds := make([]int, n)
			for i := range fds {
				fds[i] = int(null.Fd())
			}
			data := []byte(c.bytes)
			v := unix.Iovec{Base: &data[0]}
			v.SetLen(len(data))
			if _, err := fdpass.Send(a.Fd(), []unix.Iovec{v}, fds); err != nil {
				t.Fatal(err)
			}
		}
		a.Close()
		var got error
		for got == nil {
			_, _, _, got = ch.Receive()
		}
		if !errors.Is(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
		ch.Close()
	}
	leak.Settled(t, before)
}
