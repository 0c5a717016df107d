package keeper

import (
	"errors"
	"io"
	"os"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/proc"
)

func sampleSpawn() *spawnRequest {
	mask := 0o77
	return &spawnRequest{
		spec: proc.Spec{
			Key: "a", Path: "/bin/a", Dir: "/x", Args: []string{"a", "", "b"}, Env: []string{"A=1"},
			Credential: &proc.Credential{UID: 1, GID: 2, Groups: []uint32{3, 4}}, Umask: &mask, Nice: -5,
			Label: []byte{0, 1, 2}, MemoryMax: 1 << 40,
		},
		present: []bool{false, true, true},
		keep:    []string{"in", "out"},
	}
}

func sampleExit() proc.Exit {
	return proc.Exit{Code: -1, Signal: unix.SIGSEGV, Core: true, OOM: true, At: time.Unix(1, 2), User: 3, Sys: 4, MaxRSS: 5}
}

func TestRoundTrips(t *testing.T) {
	req := sampleSpawn()
	if got, err := decodeSpawn(req.encode(), 4); err != nil || !reflect.DeepEqual(got, req) {
		t.Errorf("%+v: %v", got, err)
	}
	if _, err := decodeSpawn(req.encode(), 3); !errors.Is(err, errMalformed) {
		t.Errorf("too few descriptors: %v", err)
	}
	w := welcome{version: 1, keeper: proc.ID{PID: 2, Start: 3}, tag: "t", started: time.Unix(4, 5), restarts: 6, cgroup: "c", memory: "m", notice: "n"}
	if got, err := decodeWelcome(w.encode()); err != nil || got != w {
		t.Errorf("%+v: %v", got, err)
	}
	exit := sampleExit()
	item := processItem{run: 1, id: proc.ID{PID: 2, Start: 3}, key: "k", label: []byte("l"), exit: &exit, names: []string{"a", "b"}}
	if got, err := decodeProcess(item.encode(), 2); err != nil || !reflect.DeepEqual(got, item) {
		t.Errorf("%+v: %v", got, err)
	}
	for _, err := range []error{os.ErrProcessDone, proc.ErrRunning, ErrBusy, errUnknownRun, errVersion, unix.EPERM} {
		if got, derr := decodeError(encodeError(err)); derr != nil || !errors.Is(got, err) {
			t.Errorf("%v became %v: %v", err, got, derr)
		}
	}
	serr := &proc.SpawnError{Op: proc.OpExec, Path: "/x", Err: &proc.Reason{Text: "no such file", Errno: unix.ENOENT}}
	if got, err := decodeError(encodeError(serr)); err != nil || !reflect.DeepEqual(got, error(serr)) {
		t.Errorf("%v: %v", got, err)
	}
}

func TestPackets(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pair[1]) }()
	in := newReceiver()
	for _, size := range []int{0, 1, maxPacket - headerLen, maxPacket - headerLen + 1, maxBody} {
		body := make([]byte, size)
		for i := range body {
			body[i] = byte(i * 7)
		}
		if err := sendMessage(pair[0], &message{kind: kindOK, seq: 9, body: body, fds: []int{0, 1}}); err != nil {
			t.Fatal(size, err)
		}
		m, err := in.receive(pair[1])
		if err != nil || m.kind != kindOK || m.seq != 9 || string(m.body) != string(body) || len(m.fds) != 2 {
			t.Fatal(size, err)
		}
		m.closeFDs()
	}
	if err := sendMessage(pair[0], &message{body: make([]byte, maxBody+1)}); err == nil {
		t.Error("a body that is too large was sent")
	}
	if _, err := in.receive(pair[1]); !errors.Is(err, unix.EAGAIN) {
		t.Error(err)
	}
	_ = unix.Close(pair[0])
	if _, err := in.receive(pair[1]); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// A body that its sender could still change is refused.
func TestUnsealedMemfd(t *testing.T) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if _, err := unix.Write(fd, []byte("body")); err != nil {
		t.Fatal(err)
	}
	packet := []byte{'R', 'K', framing, byte(kindSpawn), flagMemfd, 0, 0, 0, 1, 0, 0, 0}
	if _, err := decodePacket(packet, []int{fd}, 0); !errors.Is(err, errMalformed) {
		t.Error(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, memfdSeals); err != nil {
		t.Fatal(err)
	}
	dup, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := decodePacket(packet, []int{dup}, 0); err != nil || string(m.body) != "body" {
		t.Error(m, err)
	}
}

// FuzzDecodeRequest decodes what a controller may send.
func FuzzDecodeRequest(f *testing.F) {
	f.Add(sampleSpawn().encode(), 4)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, 0)
	f.Fuzz(func(t *testing.T, body []byte, fds int) {
		req, err := decodeSpawn(body, fds)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Errorf("error %v", err)
			}
			return
		}
		// What was accepted means what it says.
		if again, err := decodeSpawn(req.encode(), fds); err != nil || !reflect.DeepEqual(again, req) {
			t.Errorf("%+v became %+v: %v", req, again, err)
		}
		_ = req.spec.Validate()
	})
}

// FuzzDecodePacket decodes whole packets of every kind, on both sides.
func FuzzDecodePacket(f *testing.F) {
	exit := sampleExit()
	item := processItem{run: 1, key: "k", label: []byte("l"), exit: &exit, names: []string{"a"}}
	w := welcome{version: 1, tag: "t", started: time.Unix(4, 5)}
	for k, body := range map[kind][]byte{
		kindSpawn: sampleSpawn().encode(), kindProcess: item.encode(), kindWelcome: w.encode(),
		kindError: encodeError(unix.EPERM), kindExit: make([]byte, 54), kindPids: {1, 0, 0, 0, 7, 0, 0, 0},
		kindSignal: make([]byte, 13), kindPut: {1, 0, 0, 0, 'x', 0, 0, 0, 0}, kindHello: {1, 0, 0, 0, 1, 0, 0, 0},
		kindReplace: {1, 0, 0, 0, '/', 0, 0, 0, 0}, kindStatus: {1, 0, 0, 0, 0},
	} {
		f.Add(append([]byte{'R', 'K', framing, byte(k), 0, 0, 0, 0, 1, 0, 0, 0}, body...))
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		m, err := decodePacket(packet, nil, 0)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Errorf("error %v", err)
			}
			return
		}
		if m.kind >= kindOK {
			c := &Client{pending: map[uint32]*call{}, procs: map[uint64]*Process{}}
			_ = c.dispatch(m)
			_, _ = decodeWelcome(m.body)
			_, _ = decodeProcess(m.body, 0)
			_ = (&Inventory{}).store(m)
			return
		}
		if m.kind == kindSpawn || m.kind == kindShutdown {
			return // they act; FuzzDecodeRequest has the former
		}
		k := &keeper{runs: map[uint64]*run{}, byPID: map[int]*run{}, stored: map[string]storedFD{}, logFD: -1, hello: make(chan struct{}, 1)}
		c, err := newConnection(k, -1)
		if err == nil {
			c.closed = true
			for _, greeted := range []bool{false, true} {
				_ = k.handle(c, m, &greeted)
			}
		}
	})
}
