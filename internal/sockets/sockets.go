// Package sockets opens the listening sockets that programs are given, in the
// name of the user whom the program runs as.
//
// Invariant: a descriptor that Open returns is bound, and listens unless it is
// UDP; where it fails nothing is left, in the file system neither. What the
// owner may not do in the file system is not done.
//
// It must never accept a connection, know who will, or import anything of
// Remuda.
package sockets

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Owner is the user in whose name files are made. A nil Owner is this
// process's user.
type Owner struct{ UID, GID int }

// Do calls f with the owner's rights in the file system, so that a program
// cannot have files made where it could not make them itself.
func (o *Owner) Do(f func() error) error {
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

// Spec is a socket to be opened: at Path where that is set, else at Addr.
type Spec struct {
	Addr netip.AddrPort
	Path string
	// Datagram: UDP in place of TCP.
	Datagram bool
	// Backlog is how many connections may wait; 0: 4096. The kernel takes
	// net.core.somaxconn where that is less.
	Backlog int
	// V6Only keeps a socket of an IPv6 address from taking IPv4 too.
	V6Only bool
	// ReuseAddr lets UDP sockets share the address; TCP ones always take over
	// what connections of before have left.
	ReuseAddr bool
	// ReusePort lets sockets of this user share the address, the kernel
	// dealing out what comes among them.
	ReusePort bool
	// NonBlocking is how the descriptor is for everybody who has it.
	NonBlocking bool
	// Mode is that of the file of a Unix socket; 0: as the umask has it.
	Mode fs.FileMode
	// Stale: where a Unix socket's file is there, but nobody listens, it is
	// replaced. Else that is EADDRINUSE.
	Stale bool
}

const defaultBacklog = 4096

// Open opens the socket, with close-on-exec set. The caller owns the
// descriptor. The error is or wraps the system's errno.
func Open(s Spec, o *Owner) (fd int, err error) {
	family, sa, err := s.address()
	if err != nil {
		return -1, err
	}
	kind := unix.SOCK_STREAM
	if s.Datagram {
		kind = unix.SOCK_DGRAM
	}
	fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	made := Place{}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
			made.Remove(o)
			fd = -1
		}
	}()
	if err := unix.SetNonblock(fd, s.NonBlocking); err != nil {
		return fd, err
	}
	if family != unix.AF_UNIX {
		if err := s.options(fd, family); err != nil {
			return fd, err
		}
		if err := unix.Bind(fd, sa); err != nil {
			return fd, err
		}
	} else {
		if err := o.Do(func() error { return s.bindFile(fd, sa) }); err != nil {
			return fd, err
		}
		made = PlaceOf(fd)
		if s.Mode != 0 {
			if err := o.Do(func() error { return unix.Chmod(s.Path, uint32(s.Mode.Perm())) }); err != nil {
				return fd, fmt.Errorf("set the mode: %w", err)
			}
		}
	}
	if s.Datagram {
		return fd, nil
	}
	return fd, Listen(fd, s.Backlog)
}

// Listen has fd listen, or changes how many connections may wait.
func Listen(fd, backlog int) error {
	if backlog <= 0 {
		backlog = defaultBacklog
	}
	return unix.Listen(fd, backlog)
}

func (s *Spec) address() (family int, sa unix.Sockaddr, err error) {
	if s.Path != "" {
		return unix.AF_UNIX, &unix.SockaddrUnix{Name: s.Path}, nil
	}
	addr := s.Addr.Addr()
	if addr.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(s.Addr.Port()), Addr: addr.As4()}, nil
	}
	if !addr.Is6() {
		return 0, nil, unix.EINVAL
	}
	six := &unix.SockaddrInet6{Port: int(s.Addr.Port()), Addr: addr.As16()}
	if zone := addr.Zone(); zone != "" {
		if six.ZoneId, err = zoneID(zone); err != nil {
			return 0, nil, unix.EINVAL
		}
	}
	return unix.AF_INET6, six, nil
}

func (s *Spec) options(fd, family int) error {
	type option struct {
		level, name int
		on          bool
	}
	list := []option{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, !s.Datagram || s.ReuseAddr},
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, s.ReusePort},
	}
	if family == unix.AF_INET6 {
		list = append(list, option{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, s.V6Only})
	}
	for _, o := range list {
		value := 0
		if o.on {
			value = 1
		}
		if err := unix.SetsockoptInt(fd, o.level, o.name, value); err != nil {
			return err
		}
	}
	return nil
}

// bindFile is done in the owner's name.
func (s *Spec) bindFile(fd int, sa unix.Sockaddr) error {
	err := unix.Bind(fd, sa)
	if !errors.Is(err, unix.EADDRINUSE) || !s.Stale {
		return err
	}
	there := placeAt(s.Path)
	if there.ino == 0 || alive(sa) || there.Lost() {
		return err
	}
	if uerr := unix.Unlink(s.Path); uerr != nil && !errors.Is(uerr, unix.ENOENT) {
		return fmt.Errorf("remove what an earlier program left there: %w", uerr)
	}
	return unix.Bind(fd, sa)
}

// alive reports whether somebody listens at a Unix socket, or might.
func alive(sa unix.Sockaddr) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return true
	}
	defer func() { _ = unix.Close(fd) }()
	return !errors.Is(unix.Connect(fd, sa), unix.ECONNREFUSED)
}

// Place tells the file of a Unix socket apart from another of that name. The
// zero Place is no file.
type Place struct {
	path     string
	dev, ino uint64
}

// PlaceOf is where the Unix socket fd is reached; the zero Place where it is
// no such socket.
func PlaceOf(fd int) Place {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return Place{}
	}
	u, ok := sa.(*unix.SockaddrUnix)
	if !ok || u.Name == "" {
		return Place{}
	}
	return placeAt(u.Name)
}

func placeAt(path string) Place {
	p := Place{path: path}
	p.dev, p.ino = identity(path)
	return p
}

func identity(path string) (dev, ino uint64) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return 0, 0
	}
	return st.Dev, st.Ino
}

// Is reports whether it is a place at all.
func (p Place) Is() bool { return p.path != "" }

// Lost says that the path leads elsewhere now: somebody removed the file.
func (p Place) Lost() bool {
	if p.path == "" {
		return false
	}
	dev, ino := identity(p.path)
	return ino == 0 || dev != p.dev || ino != p.ino
}

// Remove takes the file away where it is still the socket's.
func (p Place) Remove(o *Owner) {
	if p.path != "" && !p.Lost() {
		_ = o.Do(func() error { return unix.Unlink(p.path) })
	}
}

// Chmod sets the file's mode where it is still the socket's.
func (p Place) Chmod(mode fs.FileMode, o *Owner) error {
	if p.path == "" || p.Lost() {
		return nil
	}
	return o.Do(func() error { return unix.Chmod(p.path, uint32(mode.Perm())) })
}

// Chown gives the file to another owner where it is still the socket's and has
// not that owner yet. A group alone is no reason: a folder may prescribe it.
func (p Place) Chown(o *Owner) error {
	if p.path == "" {
		return nil
	}
	fd, err := unix.Open(p.path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if o == nil {
		o = &Owner{UID: unix.Geteuid(), GID: unix.Getegid()}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Dev != p.dev || st.Ino != p.ino || int(st.Uid) == o.UID {
		return nil
	}
	return unix.Fchownat(fd, "", o.UID, o.GID, unix.AT_EMPTY_PATH)
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
