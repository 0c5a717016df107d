package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Support describes like [Launcher.Describe] what the calling process could
// have, without making anything.
func Support() (tree, memory string) {
	v2, v1 := findHierarchies()
	var g groups
	if v2.own == "" {
		g.treeWhy = v2.why
	} else {
		g.own = v2.own
		g.tree, g.treeWhy = couldMakeTree(v2.own)
	}
	g.memWhy = "no memory controller: neither in cgroup v2 nor v1"
	switch {
	case g.tree != "" && hasController(g.own, "cgroup.controllers", "memory"):
		g.mem = g.own
	case v1.own != "" && unix.Faccessat(unix.AT_FDCWD, v1.own, unix.W_OK, unix.AT_EACCESS) == nil:
		g.mem, g.memV1 = v1.own, true
	case v1.own != "":
		g.memWhy = fmt.Sprintf("our own cgroup %s is not ours to write", v1.own)
	}
	return g.describe()
}

// Sweep kills every process that an earlier keeper of the same instance tag
// left behind, and removes its cgroup directories: all in the tag's part of
// our own cgroup, and every process whose environment has [RunVar] with the
// tag, with its descendants. The calling process and its ancestors are spared.
// It returns how many processes it killed.
func Sweep(ctx context.Context, tag string) (killed int, err error) {
	if !ValidTag(tag) {
		return 0, fmt.Errorf("proc: instance tag %q is not valid", clip(tag))
	}
	spare := make(map[int]bool)
	for pid := os.Getpid(); pid > 0 && !spare[pid]; {
		spare[pid] = true
		st, err := readStat(pid)
		if err != nil {
			break
		}
		pid = st.ppid
	}
	dirs := staleDirs(tag)
	seen := make(map[ID]bool)
	trace := func() ([]ID, error) {
		all, err := allStats()
		if err != nil {
			return nil, err
		}
		in := make(map[int]bool)
		for _, st := range all {
			if !spare[st.pid] && (strings.HasPrefix(runMark(st), tag+"-") || brandedBy(tag, brandedAs(st.pid))) {
				in[st.pid] = true
			}
		}
		for _, dir := range dirs {
			pids, _ := groupMembers(dir, nil)
			for _, pid := range pids {
				if !spare[pid] {
					in[pid] = true
				}
			}
		}
		ids := closure(all, in, spare)
		for _, id := range ids {
			seen[id] = true
		}
		return ids, nil
	}
	err = killAll(ctx, trace)
	for _, dir := range dirs {
		removeGroup(dir)
	}
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	return len(seen), err
}

// staleDirs lists the tag's directories that exist and do not hold ourselves.
func staleDirs(tag string) []string {
	v2, v1 := findHierarchies()
	var dirs []string
	add := func(dir, own string) {
		if own == dir || strings.HasPrefix(own, dir+"/") {
			return
		}
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			dirs = append(dirs, dir)
		}
	}
	if v2.own != "" {
		parent := v2.own
		if filepath.Base(parent) == keeperDirName(tag) {
			parent = filepath.Dir(parent)
		}
		add(filepath.Join(parent, treeDirName(tag)), v2.own)
		add(filepath.Join(parent, memDirName(tag)), v2.own)
	}
	if v1.own != "" {
		add(filepath.Join(v1.own, treeDirName(tag)), v1.own)
	}
	return dirs
}
