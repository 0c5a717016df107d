package cluster

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Flags of libuv, which net and dgram send along.
const (
	uvTCPv6Only    = 1
	uvUDPv6Only    = 1
	uvUDPReuseAddr = 4
)

// defaultBacklog is Node's.
const defaultBacklog = 511

// bind makes the socket a worker asked for, bound and, unless it is UDP,
// listening. It is non-blocking: the workers share that setting, and each of
// them must be able to lose the race for a connection. The error is what Node
// tells its program.
func bind(q query, owner *Owner) (int, unix.Errno) {
	switch {
	case q.fd >= 0:
		// A number of the worker's descriptors says nothing here.
		return -1, unix.EINVAL
	case q.addressType == "-1":
		return bindUnix(q, owner)
	}
	kind := unix.SOCK_STREAM
	if q.udp() {
		kind = unix.SOCK_DGRAM
	}
	if q.port < 0 || q.port > 65535 {
		return -1, unix.EINVAL
	}
	if q.address != "" {
		addr, err := netip.ParseAddr(q.address)
		if err != nil {
			return -1, unix.EINVAL
		}
		return bindAddr(kind, addr, q)
	}
	if q.addressType == "udp4" {
		return bindAddr(kind, netip.IPv4Unspecified(), q)
	}
	fd, errno := bindAddr(kind, netip.IPv6Unspecified(), q)
	if errno == 0 || errno == unix.EADDRINUSE || q.addressType == "udp6" {
		return fd, errno
	}
	return bindAddr(kind, netip.IPv4Unspecified(), q) // no IPv6 here
}

func bindAddr(kind int, addr netip.Addr, q query) (int, unix.Errno) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: q.port, Addr: v4(addr)})
	if addr.Is6() {
		six := &unix.SockaddrInet6{Port: q.port, Addr: addr.As16()}
		if zone := addr.Zone(); zone != "" {
			id, err := zoneID(zone)
			if err != nil {
				return -1, unix.EINVAL
			}
			six.ZoneId = id
		}
		family, sa = unix.AF_INET6, six
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, number(err)
	}
	set := func(level, opt int, on bool) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, opt, b2i(on))
		}
	}
	stream := kind == unix.SOCK_STREAM
	if stream || q.flags&uvUDPReuseAddr != 0 {
		set(unix.SOL_SOCKET, unix.SO_REUSEADDR, true)
	}
	if family == unix.AF_INET6 {
		set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, stream && q.flags&uvTCPv6Only != 0 || !stream && q.flags&uvUDPv6Only != 0)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil && stream {
		err = unix.Listen(fd, q.depth())
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, number(err)
	}
	return fd, 0
}

func bindUnix(q query, owner *Owner) (int, unix.Errno) {
	if q.address == "" || len(q.address) > 107 {
		return -1, unix.EINVAL
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, number(err)
	}
	err = owner.as(func() error { return unix.Bind(fd, &unix.SockaddrUnix{Name: q.address}) })
	if err == nil {
		err = unix.Listen(fd, q.depth())
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, number(err)
	}
	return fd, 0
}

func (q *query) depth() int {
	if q.backlog > 0 {
		return q.backlog
	}
	return defaultBacklog
}

// as does f with the owner's rights in the file system, so that a program
// cannot have files made where it could not make them itself.
func (o *Owner) as(f func() error) error {
	if o == nil {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// These are the thread's own. They report the id before, not failure;
	// without the right to change them they stay what they are.
	gid, _ := unix.SetfsgidRetGid(o.GID)
	uid, _ := unix.SetfsuidRetUid(o.UID)
	defer func() {
		_, _ = unix.SetfsuidRetUid(uid)
		_, _ = unix.SetfsgidRetGid(gid)
	}()
	return f()
}

// place tells the file of a Unix socket apart from another of that name.
type place struct {
	path     string
	dev, ino uint64
}

// placeOf is where the Unix socket fd is reached; the zero place where it is
// no such socket.
func placeOf(fd int) place {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return place{}
	}
	u, ok := sa.(*unix.SockaddrUnix)
	if !ok || u.Name == "" {
		return place{}
	}
	p := place{path: u.Name}
	p.dev, p.ino = identity(u.Name)
	return p
}

func identity(path string) (dev, ino uint64) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return 0, 0
	}
	return st.Dev, st.Ino
}

// lost says that the path leads elsewhere now: the program removed the file
// before it listened, as many do against a stale one.
func (p place) lost() bool {
	if p.path == "" {
		return false
	}
	dev, ino := identity(p.path)
	return ino == 0 || dev != p.dev || ino != p.ino
}

// remove takes the file away where it is still the socket's.
func (p place) remove(owner *Owner) {
	if p.path != "" && !p.lost() {
		_ = owner.as(func() error { return unix.Unlink(p.path) })
	}
}

// handleType is Node's word for the socket fd.
func handleType(fd int) string {
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil && t == unix.SOCK_DGRAM {
		return "dgram.Native"
	}
	return "net.Native"
}

// nameOf is the address of a TCP socket, nil for others.
func nameOf(fd int) *sockname {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &sockname{Address: netip.AddrFrom4(sa.Addr).String(), Family: "IPv4", Port: sa.Port}
	case *unix.SockaddrInet6:
		return &sockname{Address: netip.AddrFrom16(sa.Addr).String(), Family: "IPv6", Port: sa.Port}
	}
	return nil
}

func number(err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return unix.EINVAL
}

func v4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}

func zoneID(zone string) (uint32, error) {
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	ifc, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, err
	}
	return uint32(ifc.Index), nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
