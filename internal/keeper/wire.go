package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/proc"
)

// A message is one packet on a SOCK_SEQPACKET socket:
//
//	"RK" | framing version | kind | flags (2) | zero (2) | sequence (4) | body
//
// in little endian; descriptors ride along. A body that does not fit into
// maxPacket is in a sealed memfd, the last descriptor, and the packet ends with
// the header. Strings and lists in bodies carry their length in four bytes.
// What a length promises is checked against what is there before anything is
// allocated, and nothing may be left over.

// The limits of the protocol.
const (
	protoMin  = 1 // versions of the conversation that this code speaks
	protoMax  = 1
	framing   = 1
	headerLen = 12
	maxPacket = 64 << 10 // bytes of a packet, header included
	maxBody   = 4 << 20  // bytes of a body
	maxFDs    = 250      // descriptors of a packet; the kernel's limit is 253

	maxName   = 200  // bytes of the name of a stored descriptor
	maxStored = 4096 // stored descriptors

	flagMemfd = 1
)

// The states of a status request.
const (
	statusReady uint8 = 1 + iota
	statusStopping
)

type kind uint8

// Requests, from the controller.
const (
	kindHello kind = 1 + iota
	kindSpawn
	kindSignal
	kindKill
	kindMembers
	kindForget
	kindLabel
	kindPut
	kindDrop
	kindReplace
	kindShutdown
	kindStatus
	kindAllMembers
)

// Replies and notifications, from the keeper. An exit and the items of the
// inventory are no replies: their sequence number is that of nothing.
const (
	kindOK kind = 128 + iota
	kindError
	kindWelcome
	kindSpawned
	kindPids
	kindProcess
	kindStored
	kindInventoryEnd
	kindExit
)

// message is a packet. Who holds it owns its descriptors when it was received,
// and borrows them when it is to be sent.
type message struct {
	kind kind
	seq  uint32
	body []byte
	fds  []int
}

func (m *message) closeFDs() {
	for _, fd := range m.fds {
		_ = unix.Close(fd)
	}
	m.fds = nil
}

// errMalformed is what every decoding error wraps.
var errMalformed = errors.New("malformed message")

func malformed(format string, args ...any) error {
	return fmt.Errorf("keeper: %w: %s", errMalformed, fmt.Sprintf(format, args...))
}

// sendMessage sends m without blocking; unix.EAGAIN where the socket is full.
func sendMessage(fd int, m *message) error {
	if len(m.body) > maxBody {
		return fmt.Errorf("keeper: a message of %d bytes exceeds the limit of %d", len(m.body), maxBody)
	}
	fds := m.fds
	var flags uint16
	packet := make([]byte, headerLen, headerLen+min(len(m.body), maxPacket))
	if headerLen+len(m.body) > maxPacket {
		mem, err := sealedMemfd(m.body)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(mem) }()
		fds = append(slices.Clip(fds), mem)
		flags = flagMemfd
	} else {
		packet = append(packet, m.body...)
	}
	if len(fds) > maxFDs {
		return fmt.Errorf("keeper: a message with %d descriptors exceeds the limit of %d", len(fds), maxFDs)
	}
	packet[0], packet[1], packet[2], packet[3] = 'R', 'K', framing, byte(m.kind)
	binary.LittleEndian.PutUint16(packet[4:], flags)
	binary.LittleEndian.PutUint32(packet[8:], m.seq)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		_, err := unix.SendmsgN(fd, packet, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

const memfdSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// sealedMemfd makes a memfd that holds b and can no longer be changed.
func sealedMemfd(b []byte) (int, error) {
	fd, err := unix.MemfdCreate("remuda-message", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, fmt.Errorf("keeper: memfd for a large message: %w", err)
	}
	for off := 0; off < len(b) && err == nil; {
		var n int
		if n, err = unix.Pwrite(fd, b[off:], int64(off)); err == unix.EINTR {
			err = nil
		}
		off += max(n, 0)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, memfdSeals)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("keeper: memfd for a large message: %w", err)
	}
	return fd, nil
}

// receiver holds the buffers for receiving on one socket.
type receiver struct {
	packet []byte
	oob    []byte
}

func newReceiver() *receiver {
	return &receiver{packet: make([]byte, maxPacket), oob: make([]byte, unix.CmsgSpace(4*(maxFDs+1)))}
}

// receive takes one packet without blocking: unix.EAGAIN where there is none,
// io.EOF at the end. The message's body is valid until the next call.
func (r *receiver) receive(fd int) (*message, error) {
	var n, oobn, flags int
	var err error
	for {
		n, oobn, flags, _, err = unix.Recvmsg(fd, r.packet, r.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	fds := fdpass.Parse(r.oob[:oobn])
	if n == 0 && len(fds) == 0 {
		return nil, io.EOF
	}
	m, err := decodePacket(r.packet[:n], fds, flags)
	if err != nil {
		(&message{fds: fds}).closeFDs()
		return nil, err
	}
	return m, nil
}

// decodePacket checks a packet's header and gets its body. On an error the
// caller closes all of fds.
func decodePacket(packet []byte, fds []int, flags int) (*message, error) {
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, malformed("more than %d bytes or %d descriptors, or no descriptor free", maxPacket, maxFDs)
	}
	if len(packet) < headerLen {
		return nil, malformed("%d bytes are no header", len(packet))
	}
	if packet[0] != 'R' || packet[1] != 'K' || packet[2] != framing {
		return nil, malformed("unknown header %q", packet[:3])
	}
	if packet[6] != 0 || packet[7] != 0 {
		return nil, malformed("reserved bytes are in use")
	}
	if len(fds) > maxFDs {
		return nil, malformed("%d descriptors", len(fds))
	}
	m := &message{kind: kind(packet[3]), seq: binary.LittleEndian.Uint32(packet[8:]), body: packet[headerLen:], fds: fds}
	switch f := binary.LittleEndian.Uint16(packet[4:]); {
	case f == 0:
	case f != flagMemfd:
		return nil, malformed("unknown flags %#x", f)
	case len(m.body) != 0 || len(fds) == 0:
		return nil, malformed("a body in a memfd without one")
	default:
		mem := fds[len(fds)-1]
		body, err := readMemfd(mem)
		if err != nil {
			return nil, err
		}
		_ = unix.Close(mem)
		m.body, m.fds = body, fds[:len(fds)-1]
	}
	return m, nil
}

// readMemfd reads a body that cannot change or shrink under our hands.
func readMemfd(fd int) ([]byte, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&memfdSeals != memfdSeals {
		return nil, malformed("the body is not in a sealed memfd")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Size <= 0 || st.Size > maxBody {
		return nil, malformed("a body of %d bytes", st.Size)
	}
	b := make([]byte, st.Size)
	for off := 0; off < len(b); {
		n, err := unix.Pread(fd, b[off:], int64(off))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return nil, malformed("the body cannot be read: %v", err)
		}
		off += n
	}
	return b, nil
}

// encoder builds a body.
type encoder struct{ b []byte }

func (e *encoder) u8(v uint8)   { e.b = append(e.b, v) }
func (e *encoder) u32(v uint32) { e.b = binary.LittleEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64) { e.b = binary.LittleEndian.AppendUint64(e.b, v) }
func (e *encoder) i64(v int64)  { e.u64(uint64(v)) }
func (e *encoder) flag(v bool) {
	if v {
		e.u8(1)
	} else {
		e.u8(0)
	}
}
func (e *encoder) str(s string)   { e.u32(uint32(len(s))); e.b = append(e.b, s...) }
func (e *encoder) bytes(s []byte) { e.u32(uint32(len(s))); e.b = append(e.b, s...) }
func (e *encoder) strs(l []string) {
	e.u32(uint32(len(l)))
	for _, s := range l {
		e.str(s)
	}
}

// decoder reads a body. After the first thing that does not fit everything it
// returns is zero, and end says so.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n < 0 || n > len(d.b) {
		d.bad = true
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) u8() uint8 {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) i64() int64 { return int64(d.u64()) }

func (d *decoder) flag() bool {
	v := d.u8()
	if v > 1 {
		d.bad = true
	}
	return v == 1
}

// count reads the number of entries of a list whose entries take at least
// size bytes each.
func (d *decoder) count(size int) int {
	n := d.u32()
	if uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.bad = true
		return 0
	}
	return int(n)
}

func (d *decoder) str() string { return string(d.take(d.count(1))) }

func (d *decoder) bytes() []byte {
	b := d.take(d.count(1))
	if len(b) == 0 {
		return nil
	}
	return slices.Clone(b)
}

func (d *decoder) strs() []string {
	n := d.count(4)
	if n == 0 {
		return nil
	}
	l := make([]string, 0, n)
	for range n {
		l = append(l, d.str())
	}
	return l
}

func (d *decoder) end(what string) error {
	if d.bad {
		return malformed("%s is too short or holds an impossible value", what)
	}
	if len(d.b) != 0 {
		return malformed("%d bytes follow the %s", len(d.b), what)
	}
	return nil
}

// spawnRequest is a Spec as it travels: descriptors by number, the first of
// the packet being those of files with a 1 in present, the rest those of keep.
type spawnRequest struct {
	spec    proc.Spec // without Files and Keep
	present []bool    // per entry of Spec.Files
	keep    []string
}

func (r *spawnRequest) encode() []byte {
	s := &r.spec
	var e encoder
	e.str(s.Key)
	e.str(s.Path)
	e.str(s.Dir)
	e.strs(s.Args)
	e.strs(s.Env)
	e.flag(s.Credential != nil)
	if c := s.Credential; c != nil {
		e.u32(c.UID)
		e.u32(c.GID)
		e.u32(uint32(len(c.Groups)))
		for _, g := range c.Groups {
			e.u32(g)
		}
	}
	e.flag(s.Umask != nil)
	if s.Umask != nil {
		e.u32(uint32(*s.Umask))
	}
	e.u8(uint8(int8(s.Nice)))
	e.u32(uint32(len(r.present)))
	for _, p := range r.present {
		e.flag(p)
	}
	e.strs(r.keep)
	e.bytes(s.Label)
	e.i64(s.MemoryMax)
	return e.b
}

func decodeSpawn(body []byte, fds int) (*spawnRequest, error) {
	d := decoder{b: body}
	var r spawnRequest
	s := &r.spec
	s.Key, s.Path, s.Dir = d.str(), d.str(), d.str()
	s.Args, s.Env = d.strs(), d.strs()
	if d.flag() {
		s.Credential = &proc.Credential{UID: d.u32(), GID: d.u32()}
		if n := d.count(4); n > 0 {
			s.Credential.Groups = make([]uint32, n)
			for i := range s.Credential.Groups {
				s.Credential.Groups[i] = d.u32()
			}
		}
	}
	if d.flag() {
		u := int(d.u32())
		s.Umask = &u
	}
	s.Nice = int(int8(d.u8()))
	n := d.count(1)
	if n > proc.MaxFiles {
		return nil, malformed("a spawn request with %d files", n)
	}
	need := 0
	for range n {
		p := d.flag()
		if p {
			need++
		}
		r.present = append(r.present, p)
	}
	r.keep = d.strs()
	s.Label, s.MemoryMax = d.bytes(), d.i64()
	if err := d.end("spawn request"); err != nil {
		return nil, err
	}
	if len(r.keep) > proc.MaxKeep {
		return nil, malformed("a spawn request with %d descriptors to keep", len(r.keep))
	}
	for i, name := range r.keep {
		if name == "" || len(name) > proc.MaxKey || slices.Contains(r.keep[:i], name) {
			return nil, malformed("the name %.100q for a descriptor to keep", name)
		}
	}
	if need+len(r.keep) != fds {
		return nil, malformed("a spawn request that needs %d descriptors came with %d", need+len(r.keep), fds)
	}
	return &r, nil
}

func encodeExit(e *encoder, x *proc.Exit) {
	e.i64(int64(x.Code))
	e.u32(uint32(x.Signal))
	e.flag(x.Core)
	e.flag(x.OOM)
	e.i64(x.At.UnixNano())
	e.i64(int64(x.User))
	e.i64(int64(x.Sys))
	e.i64(x.MaxRSS)
	e.flag(x.Alone)
}

func decodeExit(d *decoder) proc.Exit {
	return proc.Exit{
		Code: int(d.i64()), Signal: syscall.Signal(d.u32()), Core: d.flag(), OOM: d.flag(),
		At: time.Unix(0, d.i64()), User: time.Duration(d.i64()), Sys: time.Duration(d.i64()), MaxRSS: d.i64(),
		Alone: d.flag(),
	}
}

// welcome is the answer to hello; the inventory follows it.
type welcome struct {
	version  uint32
	keeper   proc.ID
	tag      string
	started  time.Time
	restarts uint32
	cgroup   string
	memory   string
	notice   string
}

func (w *welcome) encode() []byte {
	var e encoder
	e.u32(w.version)
	e.i64(int64(w.keeper.PID))
	e.u64(w.keeper.Start)
	e.str(w.tag)
	e.i64(w.started.UnixNano())
	e.u32(w.restarts)
	e.str(w.cgroup)
	e.str(w.memory)
	e.str(w.notice)
	return e.b
}

func decodeWelcome(body []byte) (w welcome, err error) {
	d := decoder{b: body}
	w.version = d.u32()
	w.keeper = proc.ID{PID: int(d.i64()), Start: d.u64()}
	w.tag = d.str()
	w.started = time.Unix(0, d.i64())
	w.restarts = d.u32()
	w.cgroup, w.memory, w.notice = d.str(), d.str(), d.str()
	return w, d.end("welcome")
}

// processItem is a process in the inventory; its kept descriptors ride along.
type processItem struct {
	run   uint64
	id    proc.ID
	key   string
	label []byte
	exit  *proc.Exit
	names []string
}

func (p *processItem) encode() []byte {
	var e encoder
	e.u64(p.run)
	e.i64(int64(p.id.PID))
	e.u64(p.id.Start)
	e.str(p.key)
	e.bytes(p.label)
	e.flag(p.exit != nil)
	if p.exit != nil {
		encodeExit(&e, p.exit)
	}
	e.strs(p.names)
	return e.b
}

func decodeProcess(body []byte, fds int) (p processItem, err error) {
	d := decoder{b: body}
	p.run = d.u64()
	p.id = proc.ID{PID: int(d.i64()), Start: d.u64()}
	p.key, p.label = d.str(), d.bytes()
	if d.flag() {
		x := decodeExit(&d)
		p.exit = &x
	}
	p.names = d.strs()
	if err := d.end("process"); err != nil {
		return p, err
	}
	if len(p.names) != fds {
		return p, malformed("a process with %d kept descriptors came with %d", len(p.names), fds)
	}
	return p, nil
}

// The codes of an error reply.
const (
	codeOther uint8 = iota
	codeSpawn
	codeDone
	codeRunning
	codeBusy
	codeUnknown
	codeVersion
)

// encodeError makes an error reply of err.
func encodeError(err error) []byte {
	var e encoder
	code, op, path, text := codeOther, "", "", err.Error()
	var spawn *proc.SpawnError
	var errno syscall.Errno
	switch {
	case errors.As(err, &spawn):
		code, op, path, text = codeSpawn, spawn.Op, spawn.Path, spawn.Err.Error()
	case errors.Is(err, os.ErrProcessDone):
		code = codeDone
	case errors.Is(err, proc.ErrRunning):
		code = codeRunning
	case errors.Is(err, ErrBusy):
		code = codeBusy
	case errors.Is(err, errUnknownRun):
		code = codeUnknown
	case errors.Is(err, errVersion):
		code = codeVersion
	}
	_ = errors.As(err, &errno)
	e.u8(code)
	e.str(op)
	e.str(path)
	e.u32(uint32(errno))
	e.str(strings.ToValidUTF8(text, "�"))
	return e.b
}

// decodeError makes an error of an error reply.
func decodeError(body []byte) (reply, err error) {
	d := decoder{b: body}
	code, op, path, errno, text := d.u8(), d.str(), d.str(), syscall.Errno(d.u32()), d.str()
	if err := d.end("error"); err != nil {
		return nil, err
	}
	switch code {
	case codeSpawn:
		return &proc.SpawnError{Op: op, Path: path, Err: &proc.Reason{Text: text, Errno: errno}}, nil
	case codeDone:
		return os.ErrProcessDone, nil
	case codeRunning:
		return proc.ErrRunning, nil
	case codeBusy:
		return ErrBusy, nil
	case codeUnknown:
		return errUnknownRun, nil
	case codeVersion:
		return fmt.Errorf("%w: %s", errVersion, text), nil
	}
	return &proc.Reason{Text: text, Errno: errno}, nil
}

// errUnknownRun answers a request about a process that was forgotten.
var errUnknownRun = errors.New("keeper: the process was released")

// errVersion is a keeper and a controller that have no protocol in common.
var errVersion = errors.New("keeper: no protocol version in common")
