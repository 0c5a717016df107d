// Command reload shows what a reload costs the clients of a server: clients
// that keep their connection and clients that open one for each request ask all
// the time, while the server is reloaded again and again. Not one request may
// fail; a connection that ends without an answer to a request that was sent on
// it counts, also where the connection had been idle (see package load).
//
// The servers are Node's plainest without any handling of signals and one with
// it (exec_mode: cluster), and the Go and Python servers of examples/sockets.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/test/harness"
	"github.com/remuda-dev/remuda/test/load"
)

// patience is how long anything is waited for.
const patience = 2 * time.Minute

type options struct {
	bin         string // "": it is built
	reloads     int
	kept, fresh int
	think       time.Duration
	servers     []string // nil: all
	out         io.Writer
}

func main() {
	o := options{out: os.Stdout}
	flag.StringVar(&o.bin, "bin", "", "the remuda `program` (default: it is built)")
	flag.IntVar(&o.reloads, "reloads", 10, "reloads of each server")
	flag.IntVar(&o.kept, "kept", 50, "clients that keep their connection")
	flag.IntVar(&o.fresh, "fresh", 50, "clients that open a connection for each request")
	flag.DurationVar(&o.think, "think", 0, "what a client waits between two requests")
	servers := flag.String("servers", "", "only these, divided by commas: "+strings.Join(names(), ", "))
	flag.Parse()
	if *servers != "" {
		o.servers = strings.Split(*servers, ",")
	}
	if err := run(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, "reload:", err)
		os.Exit(1)
	}
}

// server is one of those under test; its fields go into a remuda.yaml.
type server struct {
	name, run, more string
}

func names() []string { return []string{"node", "node-signals", "go", "go-reuseport", "python"} }

func servers(goServer string) []server {
	here, examples := filepath.Join(harness.Root(), "test", "reload", "testdata"), filepath.Join(harness.Root(), "examples", "sockets")
	const cluster, handed = "exec_mode: cluster, env: {PORT: %s}", `sockets: ["127.0.0.1:%s"]`
	return []server{
		{"node", "node " + filepath.Join(here, "plain.js"), cluster},
		{"node-signals", "node " + filepath.Join(here, "signals.js"), cluster},
		{"go", goServer, handed},
		{"go-reuseport", goServer, `sockets: {listen: "127.0.0.1:%s", reuseport: true}`},
		{"python", "python3 " + filepath.Join(examples, "server.py"), handed},
	}
}

// run does all of it and prints a line for each server. The error is of what
// could not be done, or tells that requests failed.
func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "reload")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.bin == "" {
		if o.bin, err = harness.Build(ctx, dir, false); err != nil {
			return err
		}
	}
	goServer := filepath.Join(dir, "goserver")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", goServer, "./examples/sockets/goserver")
	build.Dir = harness.Root()
	if b, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, b)
	}
	h, err := harness.New(o.bin, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	fmt.Fprintf(o.out, "%d clients keep their connection, %d open one for each request; %d reloads of 2 instances\n", o.kept, o.fresh, o.reloads)
	for _, s := range servers(goServer) {
		if o.servers != nil && !slices.Contains(o.servers, s.name) {
			continue
		}
		f, each, rerr := reload(ctx, h, s, o)
		if rerr != nil {
			return fmt.Errorf("%s: %w", s.name, rerr)
		}
		fmt.Fprintf(o.out, "%-13s %s; a reload took %v\n", s.name, &f, each.Round(10*time.Millisecond))
		if n := len(f.Failures); n > 0 {
			err = errors.Join(err, fmt.Errorf("%s: %d requests failed", s.name, n))
		}
	}
	return err
}

// reload puts one server under load and reloads it; each is the median time.
func reload(ctx context.Context, h *harness.Home, s server, o options) (f load.Figures, each time.Duration, err error) {
	port, err := harness.FreePort()
	if err != nil {
		return f, 0, err
	}
	file, err := h.Write("remuda.yaml", fmt.Sprintf("apps:\n  %s: {run: %s, instances: 2, %s}\n", s.name, s.run, fmt.Sprintf(s.more, port)))
	if err != nil {
		return f, 0, err
	}
	if _, err := h.Must(ctx, "up", "-f", file); err != nil {
		return f, 0, err
	}
	c := h.Client()
	defer c.Close()
	l := load.Start(load.Options{Addr: "127.0.0.1:" + port, Kept: o.kept, Fresh: o.fresh, Think: o.think, Timeout: patience})
	defer l.Stop()
	if err := serve(ctx, c, s.name, l); err != nil {
		return f, 0, err
	}
	var took []time.Duration
	for range o.reloads {
		before, err := pids(ctx, c, s.name)
		if err != nil {
			return f, 0, err
		}
		begin := time.Now()
		if _, err := h.Must(ctx, "reload", s.name); err != nil {
			return f, 0, err
		}
		took = append(took, time.Since(begin))
		if err := serve(ctx, c, s.name, l); err != nil {
			return f, 0, err
		}
		after, err := pids(ctx, c, s.name)
		if err != nil {
			return f, 0, err
		}
		for _, pid := range after {
			if slices.Contains(before, pid) {
				return f, 0, fmt.Errorf("pid %s was not reloaded", pid)
			}
		}
	}
	f = l.Stop()
	_, err = h.Must(ctx, "delete", s.name)
	return f, harness.Median(took), err
}

// serve waits until both instances have answered since it was called.
func serve(ctx context.Context, c *client.Client, app string, l *load.Load) error {
	before := l.Figures().By
	return harness.Eventually(patience, func() error {
		now := l.Figures().By
		list, err := pids(ctx, c, app)
		if err != nil {
			return err
		}
		for _, pid := range list {
			if now[pid] <= before[pid] {
				return fmt.Errorf("pid %s does not answer", pid)
			}
		}
		return nil
	})
}

func pids(ctx context.Context, c *client.Client, app string) ([]string, error) {
	list, err := c.List(ctx, app)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, i := range list {
		if i.State == client.Online {
			out = append(out, strconv.Itoa(i.PID))
		}
	}
	if len(out) != 2 {
		return nil, fmt.Errorf("%d instances are online, not 2", len(out))
	}
	return out, nil
}
