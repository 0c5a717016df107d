package cluster

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/sockets"
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
func bind(q query, owner *sockets.Owner) (int, unix.Errno) {
	switch {
	case q.fd >= 0:
		// A number of the worker's descriptors says nothing here.
		return -1, unix.EINVAL
	case q.addressType == "-1":
		return bindUnix(q, owner)
	}
	if q.port < 0 || q.port > 65535 {
		return -1, unix.EINVAL
	}
	if q.address != "" {
		addr, err := netip.ParseAddr(q.address)
		if err != nil {
			return -1, unix.EINVAL
		}
		return q.open(addr)
	}
	if q.addressType == "udp4" {
		return q.open(netip.IPv4Unspecified())
	}
	fd, errno := q.open(netip.IPv6Unspecified())
	if errno == 0 || errno == unix.EADDRINUSE || q.addressType == "udp6" {
		return fd, errno
	}
	return q.open(netip.IPv4Unspecified()) // no IPv6 here
}

func (q *query) open(addr netip.Addr) (int, unix.Errno) {
	s := sockets.Spec{Addr: netip.AddrPortFrom(addr, uint16(q.port)), Datagram: q.udp(), Backlog: q.depth(), NonBlocking: true}
	if s.V6Only = q.flags&uvTCPv6Only != 0; s.Datagram {
		s.V6Only, s.ReuseAddr = q.flags&uvUDPv6Only != 0, q.flags&uvUDPReuseAddr != 0
	}
	fd, err := sockets.Open(s, nil)
	return fd, number(err)
}

func bindUnix(q query, owner *sockets.Owner) (int, unix.Errno) {
	if q.address == "" || len(q.address) > 107 {
		return -1, unix.EINVAL
	}
	fd, err := sockets.Open(sockets.Spec{Path: q.address, Backlog: q.depth(), NonBlocking: true}, owner)
	return fd, number(err)
}

func (q *query) depth() int {
	if q.backlog > 0 {
		return q.backlog
	}
	return defaultBacklog
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

// number is the errno in err, 0 where there is no error.
func number(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno):
		return errno
	}
	return unix.EINVAL
}
