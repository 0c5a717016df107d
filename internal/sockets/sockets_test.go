package sockets

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func open(t *testing.T, s Spec) int {
	t.Helper()
	fd, err := Open(s, nil)
	if err != nil {
		t.Fatalf("%+v: %v", s, err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func port(t *testing.T, fd int) uint16 {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	}
	t.Fatalf("%T", sa)
	return 0
}

func TestAddresses(t *testing.T) {
	fd := open(t, Spec{Addr: netip.MustParseAddrPort("[::]:0")})
	at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port(t, fd))
	c, err := net.Dial("tcp", at.String()) // IPv6's any takes IPv4
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %x, %v", flags, err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("no close-on-exec: %x, %v", flags, err)
	}
	if _, err := Open(Spec{Addr: at}, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second one: %v", err)
	}
	if _, err := Open(Spec{Addr: at, ReusePort: true}, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second one that would share: %v", err)
	}
	if _, err := Open(Spec{}, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("no address: %v", err)
	}
	if _, err := Open(Spec{Addr: netip.MustParseAddrPort("[fe80::1%nosuch]:1")}, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("no such zone: %v", err)
	}

	for _, datagram := range []bool{false, true} {
		one := open(t, Spec{Addr: netip.MustParseAddrPort("127.0.0.1:0"), ReusePort: true, Datagram: datagram, NonBlocking: true})
		open(t, Spec{Addr: netip.AddrPortFrom(at.Addr(), port(t, one)), ReusePort: true, Datagram: datagram})
	}
}

func TestUnixSocketsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s := Spec{Path: path, Mode: 0o620, Stale: true}
	fd := open(t, s)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o620 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	place := PlaceOf(fd)
	if place.Lost() {
		t.Error("lost")
	}
	if err := place.Chmod(0o600, nil); err != nil {
		t.Error(err)
	}
	// Somebody listens: that is not to be replaced.
	if _, err := Open(s, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second one: %v", err)
	}
	// The file was removed and made anew: it is not the first one's any more.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := open(t, s)
	if !place.Lost() {
		t.Error("the first one's file is there")
	}
	place.Remove(nil)
	if PlaceOf(second).Lost() {
		t.Error("another's file was removed")
	}
	// When nobody listens any more it is stale.
	_ = unix.Shutdown(second, unix.SHUT_RDWR)
	if _, err := Open(Spec{Path: path}, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("over what is stale, unasked: %v", err)
	}
	next := open(t, s)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	PlaceOf(next).Remove(nil)
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}

	// What is no socket is left alone.
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "mine" {
		t.Errorf("%q %v", b, err)
	}
	if fd := PlaceOf(open(t, Spec{Addr: netip.MustParseAddrPort("127.0.0.1:0")})); fd != (Place{}) || fd.Lost() {
		t.Errorf("%+v", fd)
	}
}

func TestOwner(t *testing.T) {
	if os.Getuid() != 0 {
		return // nobody else can act in another's name
	}
	dir := t.TempDir()
	for p := dir; p != "/"; p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			break
		}
		if p == os.TempDir() || filepath.Dir(p) == os.TempDir() {
			break
		}
	}
	nobody := &Owner{UID: 65534, GID: 65534}
	path := filepath.Join(dir, "s")
	if _, err := Open(Spec{Path: path}, nobody); !errors.Is(err, unix.EACCES) {
		t.Errorf("in root's folder: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	fd, err := Open(Spec{Path: path, Mode: 0o600}, nobody)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Uid != 65534 || st.Mode&0o777 != 0o600 {
		t.Errorf("%+v %v", st, err)
	}
	for _, o := range []*Owner{nil, nobody, {UID: 65533, GID: 65533}} {
		if err := PlaceOf(fd).Chown(o); err != nil {
			t.Error(err)
		}
		want := uint32(0)
		if o != nil {
			want = uint32(o.UID)
		}
		if err := unix.Stat(path, &st); err != nil || st.Uid != want || st.Gid != want {
			t.Errorf("%+v %v, want owner %d", st, err, want)
		}
	}
}
