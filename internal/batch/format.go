package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/pool"
)

// Format is how results are written.
type Format uint8

const (
	// Lines is a line of JSON for each task: its result, or {"error": {…}}.
	Lines Format = iota
	// Raw is what the tasks' programs printed, byte for byte.
	Raw
	// Records is a line of JSON for each task that tells all about it.
	Records
)

// Failure is why a task failed, for programs.
type Failure struct {
	// Kind is task (the worker reported a failure, or its program an exit code
	// other than 0), timeout, worker_died, input (the task is not what the
	// workers can be given) or error.
	Kind    string          `json:"kind"`
	Message string          `json:"message"`
	Code    string          `json:"code,omitempty"`
	Data    json.RawMessage `json:"data,omitempty"`
}

// errInput is a task that no worker can be given.
type errInput struct{ text string }

func (e *errInput) Error() string { return e.text }

func failure(err error) Failure {
	f := Failure{Kind: "error", Message: err.Error()}
	var (
		te *pool.TaskError
		in *errInput
	)
	switch {
	case errors.As(err, &te):
		f = Failure{Kind: "task", Message: te.Message, Code: te.Code, Data: te.Data}
		if !json.Valid(f.Data) {
			f.Data = nil
		}
	case errors.As(err, &in), errors.Is(err, ipc.ErrTooLarge), errors.Is(err, ipc.ErrNotJSON):
		f.Kind = "input"
	case errors.Is(err, pool.ErrTimeout):
		f.Kind = "timeout"
	case errors.Is(err, pool.ErrWorkerDied):
		f.Kind = "worker_died"
	}
	f.Message = strings.TrimPrefix(f.Message, "pool: ")
	return f
}

// undone reports whether err says that the task was not done, rather than that
// it failed.
func undone(err error) bool {
	return errors.Is(err, pool.ErrClosed) || errors.Is(err, context.Canceled) || errors.Is(err, pool.ErrNoWorkers)
}

// Outcome is how a task ended.
type Outcome struct {
	Seq      int64 // its number in the input, from 1
	Task     []byte
	Body     []byte // the result
	Failure  *Failure
	Start    time.Time     // of the last attempt
	Took     time.Duration // of the last attempt
	PID      int           // of the worker, 0 where it is not known
	Attempts int
}

// write appends the outcome in a format to b.
func (o *Outcome) write(b *bytes.Buffer, f Format, protocol pool.Protocol) {
	switch {
	case f == Raw:
		b.Write(o.Body)
	case f == Records:
		r := struct {
			Seq     int64    `json:"seq"`
			Task    string   `json:"task"`
			OK      bool     `json:"ok"`
			Stdout  string   `json:"stdout"`
			Error   *Failure `json:"error,omitempty"`
			Start   string   `json:"start"`
			Seconds float64  `json:"seconds"`
			Tries   int      `json:"attempts"`
		}{o.Seq, text(o.Task), o.Failure == nil, text(o.Body), o.Failure, stamp(o.Start), o.Took.Seconds(), o.Attempts}
		encode(b, r)
	case o.Failure != nil:
		encode(b, map[string]*Failure{"error": o.Failure})
	default:
		jsonLine(b, protocol, o.Body)
	}
}

// encode appends a line of JSON. v has nothing that cannot be encoded.
func encode(b *bytes.Buffer, v any) {
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
}

func text(b []byte) string { return strings.ToValidUTF8(string(b), "\uFFFD") }

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// jsonLine appends a result as one line of JSON: as it is where it is JSON, else
// as a string.
func jsonLine(b *bytes.Buffer, protocol pool.Protocol, body []byte) {
	body = bytes.TrimSpace(body)
	if len(body) == 0 {
		b.WriteString("null\n")
		return
	}
	// What comes by JSON lines and from Node has been checked.
	if protocol != pool.JSONLines && protocol != pool.Node && !json.Valid(body) {
		encode(b, text(body))
		return
	}
	if bytes.ContainsAny(body, "\n\r") {
		was := b.Len()
		if json.Compact(b, body) == nil {
			b.WriteByte('\n')
			return
		}
		b.Truncate(was)
	}
	b.Write(body)
	b.WriteByte('\n')
}
