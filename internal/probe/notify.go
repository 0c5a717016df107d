package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

const (
	// maxNotify is the longest datagram taken, in bytes; longer ones are
	// dropped whole.
	maxNotify = 8 << 10
	// maxFields is how many assignments one datagram may hold.
	maxFields = 64
	// maxSocketPath is what fits the kernel's sun_path.
	maxSocketPath = 107
)

// Message is one sd_notify datagram.
type Message struct {
	// PID, UID and GID are the sender's, told by the kernel. The sender need
	// not be the program's main process (systemd-notify in a shell script is
	// a child that may have ended by now).
	PID      int
	UID, GID uint32
	// Fields are the assignments: "READY" → "1", "STATUS", "WATCHDOG",
	// "MAINPID", "RELOADING", "STOPPING", … Values are valid UTF-8 but
	// otherwise the program's own words.
	Fields map[string]string
}

// NotifyOptions says where and for whom to listen.
type NotifyOptions struct {
	// Path of the socket: what NOTIFY_SOCKET is set to. A path that begins
	// with "@" is in the abstract namespace, which has no permissions: every
	// user (of the network namespace) may send. A socket that is there
	// already is taken for a stale one and replaced: the caller holds the
	// lock that makes that true.
	Path string
	// Mode of the socket, default 0600: programs of the same user (and root)
	// only. For programs that run as another user give 0666 and a Path whose
	// folders they may search; who sent a message is known in any case.
	Mode fs.FileMode
	// OnMessage is called with each valid message, by one goroutine. It must
	// be quick, since programs that notify wait meanwhile, and must not call
	// Close.
	OnMessage func(Message)
}

// Notifier is the receiving end of sd_notify for any number of programs.
type Notifier struct {
	conn *net.UnixConn
	path string
	done chan struct{}
}

// Listen opens the socket and receives until Close. One socket serves all
// programs: who sent a message is told by the kernel (SCM_CREDENTIALS), never
// by the message.
func Listen(opt NotifyOptions) (*Notifier, error) {
	if opt.Path == "" || len(opt.Path) > maxSocketPath || strings.ContainsRune(opt.Path, 0) {
		return nil, fmt.Errorf("listen for notifications at %q: the path must have 1 to %d bytes", opt.Path, maxSocketPath)
	}
	abstract := opt.Path[0] == '@'
	if !abstract {
		if st, err := os.Lstat(opt.Path); err == nil && st.Mode().Type() == fs.ModeSocket {
			os.Remove(opt.Path)
		}
	}
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		// Before bind: a message that was sent without it has no sender.
		var err error
		if cerr := rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		}); cerr != nil {
			return cerr
		}
		return os.NewSyscallError("setsockopt", err)
	}}
	pc, err := lc.ListenPacket(context.Background(), "unixgram", opt.Path)
	if err != nil {
		return nil, fmt.Errorf("listen for notifications: %w", err)
	}
	n := &Notifier{conn: pc.(*net.UnixConn), done: make(chan struct{})}
	if !abstract {
		n.path = opt.Path
		mode := opt.Mode
		if mode == 0 {
			mode = 0o600
		}
		if err := os.Chmod(n.path, mode.Perm()); err != nil {
			_ = n.conn.Close()
			os.Remove(n.path)
			return nil, fmt.Errorf("listen for notifications: %w", err)
		}
	}
	go n.receive(opt.OnMessage)
	return n, nil
}

// Close ends receiving and removes the socket.
func (n *Notifier) Close() {
	err := n.conn.Close()
	<-n.done
	// The second time the path may be another's.
	if n.path != "" && !errors.Is(err, net.ErrClosed) {
		os.Remove(n.path)
	}
}

func (n *Notifier) receive(on func(Message)) {
	defer close(n.done)
	buf := make([]byte, maxNotify)
	// Room for the sender and some descriptors (FDSTORE=1, BARRIER=1), which
	// are closed; the kernel drops those that do not fit.
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*16))
	for {
		size, oobn, flags, _, err := n.conn.ReadMsgUnix(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		cred := credentials(oob[:oobn])
		if err != nil {
			time.Sleep(10 * time.Millisecond) // no memory, say: never spin
			continue
		}
		if cred == nil || cred.Pid <= 0 || flags&unix.MSG_TRUNC != 0 || on == nil {
			continue
		}
		fields, err := ParseNotify(buf[:size])
		if err != nil || len(fields) == 0 {
			continue
		}
		on(Message{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid, Fields: fields})
	}
}

// credentials returns the sender and closes descriptors that came along.
func credentials(oob []byte) *unix.Ucred {
	fdpass.Drop(oob)
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var cred *unix.Ucred
	for i := range msgs {
		if c, err := unix.ParseUnixCredentials(&msgs[i]); err == nil {
			cred = c
		}
	}
	return cred
}

// ParseNotify reads the assignments of one datagram, KEY=value a line. The
// last of a key counts. Empty lines pass; a line without "=", a key that is
// not made of A-Z, 0-9 and _, or more than 64 lines are errors.
func ParseNotify(b []byte) (map[string]string, error) {
	if len(b) > maxNotify {
		return nil, fmt.Errorf("notification of %d bytes: longer than %d", len(b), maxNotify)
	}
	fields := make(map[string]string, 2)
	n := 0
	for line := range strings.SplitSeq(string(b), "\n") {
		if line == "" {
			continue
		}
		if n++; n > maxFields {
			return nil, fmt.Errorf("notification of more than %d lines", maxFields)
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || !isKey(key) {
			return nil, fmt.Errorf("notification line %.40q is no KEY=value", line)
		}
		fields[key] = strings.ToValidUTF8(value, "�")
	}
	return fields, nil
}

func isKey(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return s != ""
}
