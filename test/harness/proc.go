package harness

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Proc is a process as /proc tells of it.
type Proc struct {
	PID, PPID int
	State     byte // 'R', 'S', 'Z', …
	Comm      string
	Start     uint64 // clock ticks since boot: with PID it names the process for good
	Ticks     uint64 // user and system time of it and of children it waited for not included
	Cmdline   []string
	Env       []string // nil where it may not be read
	Cwd       string
}

// Value is a variable of the process's first environment.
func (p Proc) Value(name string) string {
	for _, e := range p.Env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// Stat reads a process without its command line and environment; ok is false
// where there is none.
func Stat(pid int) (p Proc, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return p, false
	}
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < 0 {
		return p, false
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 20 {
		return p, false
	}
	p = Proc{PID: pid, State: f[0][0], Comm: string(b[open+1 : end])}
	p.PPID, _ = strconv.Atoi(f[1])
	user, _ := strconv.ParseUint(f[11], 10, 64)
	sys, _ := strconv.ParseUint(f[12], 10, 64)
	p.Ticks = user + sys
	p.Start, _ = strconv.ParseUint(f[19], 10, 64)
	return p, true
}

// Procs reads all processes. One that goes meanwhile is left out.
func Procs() []Proc {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	var out []Proc
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		p, ok := Stat(pid)
		if !ok {
			continue
		}
		p.Cmdline = split(filepath.Join("/proc", n, "cmdline"))
		p.Env = split(filepath.Join("/proc", n, "environ"))
		p.Cwd, _ = os.Readlink(filepath.Join("/proc", n, "cwd"))
		out = append(out, p)
	}
	return out
}

func split(path string) []string {
	b, err := os.ReadFile(path)
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// Belonging is every process that mentions mark in its command line,
// environment or working folder, and their descendants; not the caller, its
// ancestors and zombies that others have to reap.
func Belonging(mark string) []Proc {
	all := Procs()
	mine := map[int]bool{os.Getpid(): true}
	parent := map[int]int{}
	for _, p := range all {
		parent[p.PID] = p.PPID
	}
	for pid := os.Getpid(); pid > 1 && parent[pid] > 0; pid = parent[pid] {
		mine[parent[pid]] = true
	}
	in := map[int]bool{}
	for _, p := range all {
		if !mine[p.PID] && (has(p.Cmdline, mark) || has(p.Env, mark) || strings.HasPrefix(p.Cwd, mark)) {
			in[p.PID] = true
		}
	}
	for again := true; again; {
		again = false
		for _, p := range all {
			if !in[p.PID] && in[p.PPID] && !mine[p.PID] {
				in[p.PID], again = true, true
			}
		}
	}
	var out []Proc
	for _, p := range all {
		if in[p.PID] && (p.State != 'Z' || in[p.PPID]) {
			out = append(out, p)
		}
	}
	return out
}

func has(list []string, mark string) bool {
	for _, s := range list {
		if strings.Contains(s, mark) {
			return true
		}
	}
	return false
}

// Describe is a line for people about some processes.
func Describe(procs []Proc) string {
	var b strings.Builder
	for i, p := range procs {
		if i == 8 {
			fmt.Fprintf(&b, "; and %d more", len(procs)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "pid %d (parent %d, %c) %.120s", p.PID, p.PPID, p.State, strings.Join(p.Cmdline, " "))
		if len(p.Cmdline) == 0 {
			b.WriteString("[" + p.Comm + "]")
		}
	}
	return b.String()
}

// Children is the pids of a process's children, of all its threads.
func Children(pid int) []int {
	base := "/proc/" + strconv.Itoa(pid) + "/task"
	tasks, err := os.ReadDir(base)
	if err != nil {
		return nil
	}
	var out []int
	for _, t := range tasks {
		b, err := os.ReadFile(filepath.Join(base, t.Name(), "children"))
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// Memory is a process's resident and proportional set size in bytes.
func Memory(pid int) (rss, pss int64) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0, 0
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "Rss:":
			rss = n << 10
		case "Pss:":
			pss = n << 10
		}
	}
	return rss, pss
}
