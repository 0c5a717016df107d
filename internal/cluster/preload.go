package cluster

import (
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

//go:embed preload.js
var preload string

const preloadName = "node-cluster.cjs"

// WritePreload writes, into dir, the file that workers load first (see
// Options.Preload), and returns its path. It replaces an older one in one
// step.
func WritePreload(dir string) (string, error) {
	path := filepath.Join(dir, preloadName)
	if have, err := os.ReadFile(path); err == nil && string(have) == preload {
		return path, nil
	}
	f, err := os.CreateTemp(dir, preloadName+".*")
	if err == nil {
		_, err = f.WriteString(preload)
		if cerr := f.Chmod(0o644); err == nil {
			err = cerr
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err == nil {
			err = os.Rename(f.Name(), path)
		}
		if err != nil {
			os.Remove(f.Name())
		}
	}
	if err != nil {
		return "", fmt.Errorf("write what Node workers load first: %w", err)
	}
	return path, nil
}

// Env is environ with what a worker needs beside what nodeipc.Env tells of
// the channel. worker becomes cluster.worker.id.
func (p *Primary) Env(worker int, environ []string) []string {
	out := make([]string, 0, len(environ)+2)
	options := ""
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		switch {
		case name == "NODE_UNIQUE_ID":
			continue
		case name == "NODE_OPTIONS" && p.o.Preload != "":
			options = value + " "
			continue
		}
		out = append(out, kv)
	}
	out = append(out, "NODE_UNIQUE_ID="+strconv.Itoa(worker))
	if p.o.Preload != "" {
		quoted := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(p.o.Preload)
		out = append(out, "NODE_OPTIONS="+options+`--require "`+quoted+`"`)
	}
	return out
}
