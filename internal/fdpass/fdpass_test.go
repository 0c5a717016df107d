package fdpass

import (
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/test/leak"
)

func pair(t testing.TB) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Close(fds[:]) })
	return fds[0], fds[1]
}

func send(t testing.TB, fd int, b string, fds []int) {
	t.Helper()
	data := []byte(b)
	v := unix.Iovec{Base: &data[0]}
	v.SetLen(len(data))
	if n, err := Send(uintptr(fd), []unix.Iovec{v}, fds); n != len(b) || err != nil {
		t.Fatalf("Send = %d, %v", n, err)
	}
}

func TestPass(t *testing.T) {
	a, b := pair(t)
	r := NewReceiver(16)
	buf := make([]byte, 100)
	if _, _, err := r.Receive(uintptr(b), buf); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("nothing there: %v", err)
	}
	before := leak.Descriptors(t)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Dup([]*os.File{pr, nil}); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("Dup of nil: %v", err)
	}
	fds, err := Dup([]*os.File{pr, pw})
	if err != nil {
		t.Fatal(err)
	}
	pr.Close()
	pw.Close()
	send(t, a, "before", nil)
	send(t, a, "one", fds)
	send(t, a, "two", fds[1:])
	Close(fds)
	// What comes before a message with descriptors may come with it, what comes
	// behind does not.
	n, got, err := r.Receive(uintptr(b), buf)
	if string(buf[:n]) != "beforeone" || len(got) != 2 || err != nil {
		t.Fatalf("Receive = %q, %v, %v", buf[:n], got, err)
	}
	for _, fd := range got {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("flags %d, %v", flags, err)
		}
	}
	in, out := os.NewFile(uintptr(got[0]), "r"), os.NewFile(uintptr(got[1]), "w")
	n, got, err = r.Receive(uintptr(b), buf)
	if string(buf[:n]) != "two" || len(got) != 1 || err != nil {
		t.Fatalf("Receive = %q, %v, %v", buf[:n], got, err)
	}
	Close(got)
	if _, err := out.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	out.Close()
	if b, err := io.ReadAll(in); string(b) != "through" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	in.Close()
	if n := leak.Descriptors(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

func TestTruncated(t *testing.T) {
	a, b := pair(t)
	before := leak.Descriptors(t)
	many := make([]int, 17)
	for i := range many {
		many[i] = a
	}
	for _, room := range []int{1, 3, 16} {
		send(t, a, "x", many[:room+1])
		if _, fds, err := NewReceiver(room).Receive(uintptr(b), make([]byte, 10)); !errors.Is(err, ErrTruncated) || fds != nil {
			t.Errorf("room %d: %v, %v", room, fds, err)
		}
		send(t, a, "x", many[:room])
		_, fds, err := NewReceiver(room).Receive(uintptr(b), make([]byte, 10))
		if len(fds) != room || err != nil {
			t.Errorf("room %d: %v, %v", room, fds, err)
		}
		Close(fds)
	}
	if n := leak.Descriptors(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
	if err := unix.Shutdown(a, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if n, fds, err := NewReceiver(1).Receive(uintptr(b), make([]byte, 10)); n != 0 || fds != nil || err != nil {
		t.Errorf("at the end: %d, %v, %v", n, fds, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(unix.UnixCredentials(&unix.Ucred{Pid: 1}))
	f.Add([]byte{20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte("\x15\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x0000000")) // half a number
	f.Fuzz(func(_ *testing.T, oob []byte) {
		// Never rights: Drop would close what the process has open.
		for _, fd := range Parse(oob) {
			_ = fd
		}
	})
}

func BenchmarkReceive(b *testing.B) {
	x, y := pair(b)
	buf := make([]byte, 1024)
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			_, _ = unix.Write(x, buf[:16])
			_, _ = unix.Read(y, buf)
		}
	})
	b.Run("recvmsg", func(b *testing.B) {
		r := NewReceiver(16)
		for b.Loop() {
			_, _ = unix.Write(x, buf[:16])
			_, _, _ = r.Receive(uintptr(y), buf)
		}
	})
}
