// Command poolfaults gives a great many tasks to pools of every protocol while
// their workers are killed, stopped and made to misbehave in every way that it
// knows. Every task must end exactly once, with the right result or a typed
// error, and nothing may be left at the end: no goroutine, descriptor, process,
// mapping or folder. Exit code 0: nothing was found.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/pool"
	"github.com/remuda-dev/remuda/test/harness"
)

func main() {
	if mode := os.Getenv(modeVar); mode != "" {
		if err := beWorker(mode); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(run())
}

func run() int {
	c := &campaign{}
	flag.IntVar(&c.tasks, "tasks", 1_000_000, "how many tasks, of all pools together")
	flag.Uint64Var(&c.seed, "seed", uint64(time.Now().UnixNano()), "seed of the faults")
	flag.StringVar(&c.only, "only", "", "only the `pools` named (comma separated)")
	short := flag.Bool("short", false, "20,000 tasks, for CI")
	flag.Parse()
	if *short {
		c.tasks = 20_000
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := c.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "poolfaults:", err)
		return 1
	}
	return c.report()
}

// share is how many tenths of a percent of the tasks a pool gets: by what a
// task costs it.
type share struct {
	name     string
	protocol pool.Protocol
	permille int
	command  []string
	mode     string
}

func (c *campaign) shares() ([]share, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	file := func(name, text string) (string, error) {
		p := filepath.Join(c.dir, name)
		sdk := filepath.Join(harness.Root(), "sdk")
		text = strings.ReplaceAll(text, "SDK/", sdk+"/node/")
		return p, os.WriteFile(p, []byte(strings.ReplaceAll(text, "'SDK'", "'"+sdk+"/python'")), 0o600)
	}
	node, err1 := file("node.cjs", nodeWorker)
	nsdk, err2 := file("sdk.cjs", nodeSDK)
	py, err3 := file("sdk.py", pythonSDK)
	return []share{
		{"frames-go", pool.Frames, 400, []string{self}, "frames"},
		{"frames-node", pool.Frames, 150, []string{"node", nsdk}, ""},
		{"frames-python", pool.Frames, 100, []string{"python3", py}, ""},
		{"node", pool.Node, 150, []string{"node", node}, ""},
		{"jsonl", pool.JSONLines, 180, []string{self}, "jsonl"},
		{"exec", pool.Exec, 20, []string{self}, "exec"},
	}, errors.Join(err1, err2, err3)
}
