package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/test/harness"
)

// leaders is the live processes that are an app's own, not its children.
func (c *campaign) leaders(app string) []harness.Proc {
	return leadersOf(harness.Procs(), c.env(app), c.leaderWord(app))
}

func leadersOf(procs []harness.Proc, env, word string) []harness.Proc {
	var out []harness.Proc
	pids := map[int]bool{}
	for _, p := range procs {
		if p.State != 'Z' && p.State != 'X' && p.Value("CAMPAIGN") == env && slices.Contains(p.Cmdline, word) {
			out = append(out, p)
			pids[p.PID] = true
		}
	}
	// A child between fork and exec looks like its parent.
	return slices.DeleteFunc(out, func(p harness.Proc) bool { return pids[p.PPID] })
}

// watch looks for a program that runs twice or that must not run, until ctx
// ends. Reading /proc takes a while, so a pair counts only where both are
// still alive after both were seen.
func (c *campaign) watch(ctx context.Context) {
	tick := time.NewTicker(15 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		procs := harness.Procs()
		c.mu.Lock()
		c.scans++
		c.mu.Unlock()
		apps := []string{"exit3", "once3", "never"}
		for app := range c.steadyNames() {
			apps = append(apps, app)
		}
		for _, app := range apps {
			l := leadersOf(procs, c.env(app), c.leaderWord(app))
			most := 1
			if c.refuse[app] {
				most = 0
			}
			if len(l) <= most {
				continue
			}
			alive := slices.DeleteFunc(l, func(p harness.Proc) bool {
				now, ok := harness.Stat(p.PID)
				return !ok || now.Start != p.Start || now.State == 'Z' || now.State == 'X'
			})
			if len(alive) > most {
				c.violate("%s runs %d times: %s", app, len(alive), harness.Describe(alive))
			}
		}
	}
}

// steadyNames is what the watchman may read while the campaign runs.
func (c *campaign) steadyNames() map[string]bool {
	return map[string]bool{
		"sleep": true, "writer-sh": true, "writer-py": true, "writer-node": true,
		"rotated": true, "stamped": true, "idle": true, "forker": true,
	}
}

// tellPID tells exit3 and once3 which controller to wait for.
func (c *campaign) tellPID(ctx context.Context) error {
	info, err := c.info(ctx, 0)
	if err != nil {
		return err
	}
	tmp := filepath.Join(c.home.Dir, "ctl.tmp")
	if err := os.WriteFile(tmp, []byte(strconv.Itoa(info.PID)), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(c.home.Dir, "ctl.pid"))
}

// account counts the starts and exits that a program noted itself.
func (c *campaign) account(app string) (starts, exits int) {
	b, _ := os.ReadFile(filepath.Join(c.home.Dir, app+".account"))
	return strings.Count(string(b), "start "), strings.Count(string(b), "exit 3")
}

// once3 has the policy never: where it ended while no controller was there,
// its exit code has to be known and it must not have been started again.
func (c *campaign) once3(ctx context.Context) error {
	starts, exits := c.account("once3")
	if starts == exits {
		if err := harness.Eventually(5*time.Second, func() error {
			list, err := c.client.List(ctx, "once3")
			if err != nil {
				return err
			}
			i := list[0]
			if i.PID != 0 || i.LastExit == nil || i.LastExit.Code != 3 {
				return fmt.Errorf("once3 exited with 3 while no controller was there; it is %s, pid %d, last exit %+v", i.State, i.PID, i.LastExit)
			}
			return nil
		}); err != nil {
			c.violate("%v", err)
		}
		if _, err := c.client.Act(ctx, client.ActRequest{Verb: client.VerbStart, Targets: []string{"once3"}}); err != nil {
			return err
		}
		if err := harness.Eventually(5*time.Second, func() error {
			if s, _ := c.account("once3"); s != starts+1 {
				return fmt.Errorf("once3 was started once more and counts %d starts after %d", s, starts)
			}
			return nil
		}); err != nil {
			c.violate("%v", err)
		}
	}
	return nil
}

// settleExits holds what exit3 counted against what the daemon counted.
func (c *campaign) settleExits(ctx context.Context) error {
	var exits int
	err := harness.Eventually(10*time.Second, func() error {
		var starts int
		starts, exits = c.account("exit3")
		list, err := c.client.List(ctx, "exit3")
		if err != nil {
			return err
		}
		i := list[0]
		switch {
		case starts != exits+1:
			return fmt.Errorf("exit3 ended %d times and was started %d times", exits, starts)
		case i.Restarts != exits:
			return fmt.Errorf("exit3 ended %d times with code 3, the daemon counts %d restarts", exits, i.Restarts)
		case i.State != client.Online:
			return fmt.Errorf("exit3 is %s (%s)", i.State, i.Reason)
		case exits > 0 && (i.LastExit == nil || i.LastExit.Code != 3):
			return fmt.Errorf("exit3 ended with 3, its last exit is %+v", i.LastExit)
		}
		return nil
	})
	if err != nil {
		c.violate("%v", err)
	}
	_, once := c.account("once3")
	c.tally = append(c.tally, fmt.Sprintf("exit code 3 while the controller was down: %d times restarted (always), %d times left (never)", exits, once))
	return nil
}

// rememberChildren notes the forker's descendants.
func (c *campaign) rememberChildren(context.Context) error {
	return harness.Eventually(10*time.Second, func() error {
		c.children = map[int]uint64{}
		for _, p := range harness.Procs() {
			if p.Value("CAMPAIGN") == c.env("forker") && p.Comm == "sleep" {
				c.children[p.PID] = p.Start
			}
		}
		if len(c.children) != 4 {
			return fmt.Errorf("the forker has %d descendants in place of 4", len(c.children))
		}
		return nil
	})
}

// checkLogs holds processes and logs against what they have to be, then stops
// the writers, whose last line has to be there too, and starts them again.
func (c *campaign) checkLogs(ctx context.Context) error {
	for pid, start := range c.children {
		if p, ok := harness.Stat(pid); !ok || p.Start != start {
			c.violate("grandchild %d of the forker is gone", pid)
		}
	}
	list, err := c.client.List(ctx)
	if err != nil {
		return err
	}
	writers := map[string]client.Instance{}
	for _, i := range list {
		if isSteady(i.App) {
			if i.Restarts != 0 || i.State != client.Online {
				c.violate("%s: %s with %d restarts", i.App, i.State, i.Restarts)
			}
			if strings.HasPrefix(i.App, "writer-") || i.App == "rotated" || i.App == "stamped" {
				writers[i.App] = i
			}
		}
		if i.App == "never" && i.State != client.Stopped {
			c.violate("never is %s", i.State)
		}
	}
	if len(list) != len(c.steady)+3 {
		c.violate("%d instances in the list in place of %d", len(list), len(c.steady)+3)
	}
	for app := range writers {
		if _, err := c.client.Act(ctx, client.ActRequest{Verb: client.VerbStop, Targets: []string{app}}); err != nil {
			return err
		}
	}
	for app, i := range writers {
		b, err := os.ReadFile(filepath.Join(c.home.Dir, app+".end"))
		if err != nil {
			c.violate("%s did not end on SIGTERM: %v", app, err)
			continue
		}
		last, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			return err
		}
		var files int
		err = harness.Eventually(5*time.Second, func() (err error) {
			files, err = checkSequence(i.OutPath, last)
			return err
		})
		if err != nil {
			c.violate("log of %s: %v", app, err)
		}
		c.tally = append(c.tally, fmt.Sprintf("%-12s %8d lines in %d files, no gap, no duplicate", app, last, files))
	}
	slices.Sort(c.tally)
	for app := range writers {
		if _, err := c.client.Act(ctx, client.ActRequest{Verb: client.VerbStart, Targets: []string{app}}); err != nil {
			return err
		}
	}
	list, err = c.client.List(ctx)
	if err != nil {
		return err
	}
	for _, i := range list {
		if _, ok := writers[i.App]; ok {
			c.steady[i.App] = i.PID
		}
	}
	return nil
}

// checkSequence reads a log and what was rotated from it: every line is the
// one after the line before, from 1 to last.
func checkSequence(path string, last int) (files int, err error) {
	base := strings.TrimSuffix(path, ".log")
	names, err := filepath.Glob(base + "*")
	if err != nil {
		return 0, err
	}
	type part struct {
		name     string
		from, to int
	}
	var parts []part
	for _, name := range names {
		b, err := readLog(name)
		if err != nil {
			return 0, err
		}
		p := part{name: filepath.Base(name)}
		s := bufio.NewScanner(bytes.NewReader(b))
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			_, num, ok := strings.Cut(s.Text(), "seq ")
			n, err := strconv.Atoi(num)
			if !ok || err != nil {
				return 0, fmt.Errorf("%s after %d: broken line %.100q", p.name, p.to, s.Text())
			}
			if p.from == 0 {
				p.from = n
			} else if n != p.to+1 {
				return 0, fmt.Errorf("%s: line %d after %d", p.name, n, p.to)
			}
			p.to = n
		}
		if err := s.Err(); err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
		if p.from > 0 {
			parts = append(parts, p)
		}
	}
	slices.SortFunc(parts, func(a, b part) int { return a.from - b.from })
	at := 0
	for _, p := range parts {
		if p.from != at+1 {
			return 0, fmt.Errorf("%s begins with line %d after %d", p.name, p.from, at)
		}
		at = p.to
	}
	if at != last {
		return 0, fmt.Errorf("the last line is %d, %d was the last written", at, last)
	}
	return len(parts), nil
}

func readLog(name string) ([]byte, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	switch filepath.Ext(name) {
	case ".gz":
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out, err := io.ReadAll(r)
		return out, errors.Join(err, r.Close())
	case ".zst":
		r, err := zstd.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	return b, nil
}
