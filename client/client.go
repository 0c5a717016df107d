package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// API is the version of the HTTP API this package speaks. It grows when an
// older peer could misunderstand a newer one.
const API = 1

// HeaderAPI carries the caller's [API] in every request but those for info,
// upgrade and kill, and the daemon's in every answer.
const HeaderAPI = "Remuda-Api"

// ErrUnreachable says that no daemon answered on the socket.
var ErrUnreachable = errors.New("no daemon is running")

// ErrNoTarget says that a target matched nothing.
var ErrNoTarget = errors.New("no such app")

// Error is a refusal by the daemon.
type Error struct {
	Status int    // HTTP status
	Detail string // what went wrong, with which input, and what to do

	// Of tasks of pools: what kind of failure it is, and where the worker
	// reported it, its own code and data (JSON).
	Kind TaskKind
	Code string
	Data json.RawMessage
}

func (e *Error) Error() string { return e.Detail }

// Is makes a 404 an [ErrNoTarget].
func (e *Error) Is(target error) bool {
	return target == ErrNoTarget && e.Status == http.StatusNotFound
}

// Home is the folder of the daemon: $REMUDA_HOME, or ~/.remuda.
func Home() (string, error) {
	if h := os.Getenv("REMUDA_HOME"); h != "" {
		abs, err := filepath.Abs(h)
		if err != nil {
			return "", fmt.Errorf("REMUDA_HOME=%q: %w", h, err)
		}
		return abs, nil
	}
	h, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("cannot tell where the daemon's folder is: %w; set REMUDA_HOME", err)
	}
	return filepath.Join(h, ".remuda"), nil
}

// SocketPath is the daemon's socket in its home folder.
func SocketPath(home string) string { return filepath.Join(home, "remuda.sock") }

// Client calls one daemon. It is safe for concurrent use and holds no
// connection while idle for more than a moment; Close drops them.
type Client struct {
	home string
	http *http.Client
}

// New returns a client of the daemon whose folder is home. It does not connect:
// each call does.
func New(home string) *Client {
	path := SocketPath(home)
	return &Client{home: home, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return dialUnix(ctx, &d, path)
		},
		DisableCompression: true,
		IdleConnTimeout:    5 * time.Second,
	}}}
}

// dialUnix reaches sockets whose path is longer than the kernel's 107 bytes by
// way of the folder's descriptor. Where so many call at once that the socket's
// queue is full, it waits for a place in it.
func dialUnix(ctx context.Context, d *net.Dialer, path string) (net.Conn, error) {
	if len(path) >= 108 {
		dir, err := os.Open(filepath.Dir(path))
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: "unix", Err: err}
		}
		defer dir.Close()
		path = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	}
	for {
		conn, err := d.DialContext(ctx, "unix", path)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Home is the folder of the daemon this client calls.
func (c *Client) Home() string { return c.home }

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Info describes the daemon; it is the cheapest call and serves as a ping.
func (c *Client) Info(ctx context.Context) (Info, error) {
	return call[Info](ctx, c, http.MethodGet, "/v1/info", nil, nil)
}

// List returns the instances that any of targets matches, all where none is
// given, in order of id. A target that matches nothing gives [ErrNoTarget].
func (c *Client) List(ctx context.Context, targets ...Target) ([]Instance, error) {
	out, err := call[struct{ Instances []Instance }](ctx, c, http.MethodGet, "/v1/instances", url.Values{"target": targets}, nil)
	return out.Instances, err
}

// Describe is [Client.List] with specs and environments. Values of variables
// whose names look like secrets are masked unless secrets is set.
func (c *Client) Describe(ctx context.Context, secrets bool, targets ...Target) ([]Detail, error) {
	q := url.Values{"target": targets}
	if secrets {
		q.Set("secrets", "true")
	}
	out, err := call[struct{ Details []Detail }](ctx, c, http.MethodGet, "/v1/details", q, nil)
	return out.Details, err
}

// Start adds apps and starts them, or starts again those that are known. It
// returns once each has become ready, has come to rest, or has failed.
func (c *Client) Start(ctx context.Context, req StartRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/start", nil, req)
}

// Act carries out a verb on targets and returns when it is done.
func (c *Client) Act(ctx context.Context, req ActRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/act", nil, req)
}

// Signal sends a signal to the leaders of the runs that targets match.
func (c *Client) Signal(ctx context.Context, req SignalRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/signal", nil, req)
}

// Message sends a message to the Node programs that targets match and, where it
// is asked for, waits for their replies.
func (c *Client) Message(ctx context.Context, req MessageRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/message", nil, req)
}

// Scale sets the number of instances of an app.
func (c *Client) Scale(ctx context.Context, req ScaleRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/scale", nil, req)
}

// Up makes what runs of one file equal the file.
func (c *Client) Up(ctx context.Context, req UpRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/up", nil, req)
}

// Down stops and deletes every app that came from source.
func (c *Client) Down(ctx context.Context, source string) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/down", nil, map[string]string{"source": source})
}

// Saved is what save wrote.
type Saved struct {
	Path  string `json:"path"`
	Apps  int    `json:"apps"`
	Pools int    `json:"pools,omitempty"`
}

// Save writes the present apps to the dump file that resurrect reads.
func (c *Client) Save(ctx context.Context, force bool) (Saved, error) {
	return call[Saved](ctx, c, http.MethodPost, "/v1/save", nil, map[string]bool{"force": force})
}

// Resurrect starts what the dump file holds and is not there yet.
func (c *Client) Resurrect(ctx context.Context) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/resurrect", nil, struct{}{})
}

// Upgrade makes the keeper start binary as the next controller, in place of
// the present one, and returns when it serves. No app is touched.
func (c *Client) Upgrade(ctx context.Context, binary string) (Info, error) {
	before, err := c.Info(ctx)
	if err != nil {
		return Info{}, err
	}
	if _, err := call[struct{}](ctx, c, http.MethodPost, "/v1/upgrade", nil, map[string]string{"binary": binary}); err != nil {
		return Info{}, err
	}
	c.Close()
	for {
		now, err := c.Info(ctx)
		if err == nil && now.PID != before.PID {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return Info{}, fmt.Errorf("the new controller does not answer: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Kill stops every app and ends the daemon. It returns when the daemon is
// gone.
func (c *Client) Kill(ctx context.Context) error {
	info, err := c.Info(ctx)
	if err != nil {
		return err
	}
	gone, err := waitFor(info.KeeperPID)
	if err != nil {
		return err
	}
	defer gone.Close()
	_, err = call[struct{}](ctx, c, http.MethodPost, "/v1/kill", nil, struct{}{})
	var refused *Error
	if errors.As(err, &refused) || ctx.Err() != nil {
		return err
	}
	if err != nil {
		// It may have ended before its answer was out.
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if gone.wait(short) != nil {
			return err
		}
		return nil
	}
	return gone.wait(ctx)
}

// Logs streams log lines until the query is exhausted, ctx ends or the daemon
// goes. A follower that loses the daemon gets an error; it can go on with
// Since set to the time of the last line it saw.
func (c *Client) Logs(ctx context.Context, q LogQuery) iter.Seq2[LogLine, error] {
	v := url.Values{"target": q.Targets, "lines": {strconv.Itoa(q.Lines)}}
	set := func(name string, on bool) {
		if on {
			v.Set(name, "true")
		}
	}
	set("out", q.Out)
	set("err", q.Err)
	set("follow", q.Follow)
	if !q.Since.IsZero() {
		v.Set("since", q.Since.Format(time.RFC3339Nano))
	}
	if !q.Until.IsZero() {
		v.Set("until", q.Until.Format(time.RFC3339Nano))
	}
	if q.Grep != "" {
		v.Set("grep", q.Grep)
	}
	return stream[LogLine](ctx, c, "/v1/logs", v)
}

// Events streams events: first those kept with a Seq over after, then, where
// follow is set, new ones as they happen.
func (c *Client) Events(ctx context.Context, after uint64, follow bool, targets ...Target) iter.Seq2[Event, error] {
	v := url.Values{"after": {strconv.FormatUint(after, 10)}, "target": targets}
	if follow {
		v.Set("follow", "true")
	}
	return stream[Event](ctx, c, "/v1/events", v)
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	if body == nil {
		return c.send(ctx, method, path, query, "", nil)
	}
	b, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c.send(ctx, method, path, query, "application/json", b)
}

// send is do for a body as it is; without a content type there is none.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, contentType string, body []byte) (*http.Response, error) {
	var r io.Reader
	if contentType != "" {
		r = bytes.NewReader(body)
	}
	u := "http://remuda" + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if !timeless(path) {
		req.Header.Set(HeaderAPI, strconv.Itoa(API))
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	for end := time.Now().Add(betweenControllers); err != nil && c.restarting(err, method == http.MethodGet) && time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
		again := req.Clone(ctx)
		if req.GetBody != nil {
			again.Body, _ = req.GetBody() // of a bytes.Reader: it cannot fail
		}
		resp, err = c.http.Do(again)
	}
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, refusal(resp)
	}
	return resp, nil
}

// betweenControllers is how long a call waits for a daemon that has no
// controller at the moment.
const betweenControllers = 5 * time.Second

// restarting says whether a call failed only because the daemon's controller
// has just died or been replaced: nobody listens, but the keeper holds its
// lock. A call that changes nothing may also have been under way just then.
func (c *Client) restarting(err error, changesNothing bool) bool {
	refused := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
	cut := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	if !refused && (!cut || !changesNothing) {
		return false
	}
	// A controller whose keeper was killed becomes the next keeper.
	return held(filepath.Join(c.home, "keeper.lock")) || held(filepath.Join(c.home, "controller.lock"))
}

// held says whether a process holds a lock.
func held(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// timeless says whether a call is the same in all versions of the API: what
// must work between a command and a daemon that otherwise do not understand
// each other, so that one can be upgraded or ended by the other.
func timeless(path string) bool {
	return path == "/v1/info" || path == "/v1/upgrade" || path == "/v1/kill"
}

func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("%w that you may talk to: %s: %w; it belongs to another user", ErrUnreachable, SocketPath(c.home), os.ErrPermission)
		}
		for _, none := range []syscall.Errno{syscall.ENOENT, syscall.ECONNREFUSED, syscall.ENOTDIR, syscall.ENOTSOCK, syscall.EPROTOTYPE} {
			if errors.Is(err, none) {
				if c.restarting(err, false) {
					return fmt.Errorf("%w in %s: its keeper lives, but no controller comes up; see %s", ErrUnreachable, c.home, filepath.Join(c.home, "logs", "daemon.log"))
				}
				return fmt.Errorf("%w in %s", ErrUnreachable, c.home)
			}
		}
		return fmt.Errorf("cannot reach the daemon in %s: %w", c.home, op.Err)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return fmt.Errorf("the daemon hung up: %w", err)
}

// refusal turns an RFC 9457 problem into an *Error.
func refusal(resp *http.Response) error {
	var p struct {
		Title  string
		Detail string
		Kind   TaskKind
		Code   string
		Data   json.RawMessage
		Errors []struct {
			Message  string
			Location string
		}
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if json.Unmarshal(b, &p) != nil || (p.Detail == "" && p.Title == "") {
		p.Detail = fmt.Sprintf("the daemon answered %s: %.200s", resp.Status, b)
	}
	if p.Detail == "" {
		p.Detail = p.Title
	}
	var more []string
	for _, e := range p.Errors {
		if e.Location != "" {
			e.Message = e.Location + ": " + e.Message
		}
		more = append(more, e.Message)
	}
	if len(more) > 0 {
		p.Detail += ": " + strings.Join(more, "; ")
	}
	return &Error{Status: resp.StatusCode, Detail: p.Detail, Kind: p.Kind, Code: p.Code, Data: p.Data}
}

func call[T any](ctx context.Context, c *Client, method, path string, query url.Values, body any) (T, error) {
	var out T
	resp, err := c.do(ctx, method, path, query, body)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNoContent {
		return out, nil
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, fmt.Errorf("%s: the daemon's answer cannot be read (is it of another version? see `remuda version`): %w", path, err)
	}
	return out, nil
}

// stream reads one JSON value a line. A last line {"error": …} is the
// daemon's word that the stream broke off.
func stream[T any](ctx context.Context, c *Client, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		resp, err := c.do(ctx, http.MethodGet, path, query, nil)
		if err != nil {
			yield(none, err)
			return
		}
		defer resp.Body.Close()
		r := bufio.NewReaderSize(resp.Body, 64<<10)
		for {
			line, err := r.ReadBytes('\n')
			if err != nil && !errors.Is(err, io.EOF) {
				err = fmt.Errorf("the daemon hung up: %w", err)
			} else if len(line) > 0 {
				var item struct {
					Error string `json:"error"`
					Value *T     `json:"value"`
				}
				if jerr := json.Unmarshal(line, &item); jerr != nil {
					err = fmt.Errorf("%s: broken line in the stream: %w", path, jerr)
				} else if item.Value != nil {
					if !yield(*item.Value, nil) {
						return
					}
				} else if item.Error != "" {
					err = &Error{Status: http.StatusInternalServerError, Detail: item.Error}
				}
			}
			switch {
			case err == nil:
			case errors.Is(err, io.EOF):
				return
			case ctx.Err() != nil:
				yield(none, ctx.Err())
				return
			default:
				yield(none, err)
				return
			}
		}
	}
}
