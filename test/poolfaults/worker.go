package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
	sdk "github.com/remuda-dev/remuda/worker"
)

// The environment of the workers.
const (
	modeVar = "POOLFAULTS_WORKER" // frames, jsonl or exec: be that worker
	logVar  = "POOLFAULTS_LOG"    // where each task that was begun is written down
	dirVar  = "POOLFAULTS_DIR"    // the mark of this run on its processes
)

// order is a task as the workers get it.
type order struct {
	N     uint64 `json:"n"`
	Fault string `json:"fault,omitempty"`
	Pad   string `json:"pad,omitempty"`
}

// reply is a task's result: what the worker made of it.
type reply struct {
	N   uint64 `json:"n"`
	Pad int    `json:"pad"`
}

// beWorker runs the worker that mode names.
func beWorker(mode string) error {
	log, err := os.OpenFile(os.Getenv(logVar), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	// What leaks descriptors is to meet its end soon.
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 256, Max: 256}) // less is the point
	do := func(body []byte) ([]byte, error) {
		var o order
		if err := json.Unmarshal(body, &o); err != nil {
			return nil, err
		}
		if err := note(log, o.N); err != nil {
			return nil, err
		}
		if err := fault(o.Fault, mode); err != nil {
			return nil, err
		}
		return json.Marshal(reply{o.N, len(o.Pad)})
	}
	switch mode {
	case "frames":
		return sdk.Serve(context.Background(), sdk.Handlers{"": func(_ context.Context, t *sdk.Task) ([]byte, error) { return do(t.Body) }})
	case "jsonl":
		in := bufio.NewReaderSize(os.Stdin, 1<<20)
		for {
			line, err := in.ReadBytes('\n')
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			out, err := do(line)
			if err != nil {
				out, _ = json.Marshal(map[string]string{"error": err.Error()})
			}
			if _, err := os.Stdout.Write(append(out, '\n')); err != nil {
				return err
			}
		}
	case "exec":
		body, err := io.ReadAll(os.Stdin)
		if err != nil {
			return err
		}
		out, err := do(body)
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(out)
		return err
	}
	return fmt.Errorf("no worker is called %q", mode)
}

// note writes down that a task was begun: one write, so that lines of several
// workers never mix.
func note(log *os.File, n uint64) error {
	_, err := log.WriteString(strconv.FormatUint(n, 10) + "\n")
	return err
}

// fault does what the task asks for. It may not return.
func fault(name, mode string) error {
	channel := map[string]int{"frames": 3, "jsonl": 1, "exec": 1}[mode]
	self := os.Getpid()
	switch name {
	case "":
	case "kill":
		_ = syscall.Kill(self, syscall.SIGKILL)
		select {}
	case "stop":
		_ = syscall.Kill(self, syscall.SIGSTOP)
		select {}
	case "garbage":
		_, _ = syscall.Write(channel, []byte("\x00\xff{this is neither a frame nor a line}]\n\n"))
		time.Sleep(time.Hour)
	case "half":
		_, _ = syscall.Write(channel, []byte("{\"n\":")) // a frame of 2 GB begun, half a line
		select {}
	case "close":
		if syscall.Shutdown(channel, syscall.SHUT_RDWR) != nil {
			_ = syscall.Close(channel)
		}
		time.Sleep(time.Hour)
	case "balloon":
		return balloon()
	case "spin":
		for {
			self++
		}
	case "exit0":
		os.Exit(0)
	case "leak":
		for {
			if _, err := unix.Open("/dev/null", unix.O_RDONLY, 0); err != nil {
				return &ipc.TaskError{Code: "leaked", Message: err.Error()}
			}
		}
	case "gift": // descriptors that nobody asked for
		oob := unix.UnixRights(0, 0, 0)
		_ = unix.Sendmsg(channel, []byte("x"), oob, nil, 0) // a pipe cannot: then nothing
		select {}
	case "error":
		return &ipc.TaskError{Code: "asked", Message: "as asked for"}
	case "panic":
		panic("as asked for")
	}
	return nil
}

// balloon touches a gigabyte.
func balloon() error {
	const size = 1 << 30
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	for i := 0; i < size; i += 4096 {
		b[i] = 1
	}
	select {}
}

// The workers that are not this program.
const (
	nodeFaults = `
const fs = require('node:fs'), net = require('node:net')
const log = fs.openSync(process.env.POOLFAULTS_LOG, 'a')
const leaked = []
function work (o, channel) {
  fs.writeSync(log, o.n + '\n')
  switch (o.fault) {
    case 'kill': process.kill(process.pid, 'SIGKILL'); for (;;);
    case 'stop': process.kill(process.pid, 'SIGSTOP'); break
    case 'garbage': fs.writeSync(channel, '\x00\xff{neither a frame nor a line}]\n\n'); for (;;);
    case 'half': fs.writeSync(channel, '{"n":'); for (;;);
    case 'close': fs.closeSync(channel); for (;;);
    case 'balloon': leaked.push(Buffer.alloc(1 << 30, 1)); for (;;);
    case 'spin': for (;;);
    case 'exit0': process.exit(0)
    case 'leak': for (let i = 0; i < 200; i++) leaked.push(fs.openSync('/dev/null', 'r')); break
    case 'error': throw new Error('as asked for')
    case 'panic': setImmediate(() => { throw new Error('not caught') }); return new Promise(() => {})
    case 'gift': return gift(o)
  }
  return { n: o.n, pad: (o.pad ?? '').length }
}
`
	nodeWorker = nodeFaults + `
// The answer comes with a socket that nobody asked for.
function gift (o) {
  const s = net.createServer().listen(0, '127.0.0.1', () => {
    process.send({ n: o.n, pad: (o.pad ?? '').length }, s, () => s.close())
  })
  return new Promise(() => {})
}
process.on('message', (o) => {
  try {
    const r = work(o, 3)
    if (!(r instanceof Promise)) process.send(r)
  } catch (err) { process.send({ error: err.message }) }
})
`
	nodeSDK = nodeFaults + `
function gift (o) { fs.writeSync(3, 'not a frame'); for (;;); }
const { serve } = require('SDK/remuda-worker.cjs')
serve({ '': (t) => work(t.data, 3) })
`
	pythonSDK = `
import os, resource, signal, sys, time
sys.path.insert(0, 'SDK')
import remuda_worker
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
log = os.open(os.environ['POOLFAULTS_LOG'], os.O_WRONLY | os.O_APPEND)
leaked = []
def work(t):
    o = t.data
    os.write(log, b'%d\n' % o['n'])
    f = o.get('fault')
    if f == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    elif f == 'stop': os.kill(os.getpid(), signal.SIGSTOP); time.sleep(3600)
    elif f == 'garbage': os.write(3, b'\x00\xff{neither a frame nor a line}]\n\n'); time.sleep(3600)
    elif f == 'half': os.write(3, b'{"n":'); time.sleep(3600)
    elif f == 'close': os.close(3); time.sleep(3600)
    elif f == 'balloon': leaked.append(bytearray(b'x') * (1 << 30)); time.sleep(3600)
    elif f == 'spin':
        while True: pass
    elif f == 'exit0': os._exit(0)
    elif f == 'leak':
        while True: leaked.append(os.open('/dev/null', os.O_RDONLY))
    elif f in ('error', 'panic'): raise ValueError('as asked for')
    elif f == 'gift':
        import socket
        socket.send_fds(socket.socket(fileno=os.dup(3)), [b'x'], [0, 0, 0]); time.sleep(3600)
    return {'n': o['n'], 'pad': len(o.get('pad', ''))}
remuda_worker.serve({'': work})
`
)
