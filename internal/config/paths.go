package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/joho/godotenv"
)

// discard is where output goes that nobody wants.
const discard = "/dev/null"

// absPath is p, with ~ for home, relative to dir.
func absPath(dir, p, home string) string {
	if p == "~" || strings.HasPrefix(p, "~/") {
		if home != "" {
			p = home + p[1:]
		}
	}
	if !filepath.IsAbs(p) {
		p = dir + "/" + p
	}
	return filepath.Clean(p)
}

func logPath(dir, p, home string) string {
	switch p {
	case "":
		return ""
	case "none", "NULL", discard: // NULL is PM2's word
		return discard
	}
	return absPath(dir, p, home)
}

func relativeTo(dir, p string) (string, bool) {
	if p == "" {
		return "", false
	}
	rel, err := filepath.Rel(dir, p)
	return rel, err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// globQuote makes a path a glob that matches it alone.
func globQuote(s string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`, "{", `\{`).Replace(s)
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// reason is err without the operation and path, which our messages have.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// checkDir says why dir cannot be a working directory.
func checkDir(dir string) error {
	st, err := os.Stat(dir)
	switch {
	case isNotExist(err):
		return fmt.Errorf("folder %s does not exist", dir)
	case err != nil:
		return fmt.Errorf("folder %s: %w", dir, reason(err))
	case !st.IsDir():
		return fmt.Errorf("%s is not a folder", dir)
	}
	return nil
}

// checkProgram says why path cannot be executed.
func checkProgram(path string) error {
	st, err := os.Stat(path)
	switch {
	case isNotExist(err):
		return fmt.Errorf("program %s does not exist", path)
	case err != nil:
		return fmt.Errorf("program %s: %w", path, reason(err))
	case st.IsDir():
		return fmt.Errorf("%s is a folder, not a program", path)
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", path)
	case st.Mode()&0o111 == 0:
		return fmt.Errorf("%s is not executable; run chmod +x on it, or name its interpreter", path)
	}
	return nil
}

// lookPath finds a program in a PATH that need not be this process's own;
// relative entries are relative to dir.
func lookPath(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		p := absPath(dir, name, "")
		return p, checkProgram(p)
	}
	for _, d := range filepath.SplitList(path) {
		p := absPath(dir, orElse(d, "."), "") + "/" + name
		if checkProgram(p) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not in PATH", clip(name))
}

// readBounded reads a regular file of at most maxFile bytes. A FIFO or device
// is refused rather than waited for.
func readBounded(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case st.IsDir():
		return nil, errors.New("is a folder, not a file")
	case !st.Mode().IsRegular():
		return nil, errors.New("is no regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("is larger than %d MiB", maxFile>>20)
	}
	return data, err
}

// environMap reads what os.Environ gives; the first of two wins, as in getenv.
func environMap(environ []string) map[string]string {
	m := make(map[string]string, len(environ))
	for _, kv := range environ {
		name, val, ok := strings.Cut(kv, "=")
		if _, dup := m[name]; !ok || dup || badEnv(name, val) != "" {
			continue
		}
		m[name] = val
	}
	return m
}

func readEnvFile(path string) (map[string]string, error) {
	data, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, reason(err))
	}
	return parseEnv(path, data)
}

// parseEnv reads a .env file: NAME=value lines, quotes, comments, export.
func parseEnv(path string, data []byte) (m map[string]string, err error) {
	defer func() {
		if recover() != nil {
			m, err = nil, &Error{[]Problem{{File: path, Text: "this is not a .env file of NAME=value lines"}}}
		}
	}()
	if err := checkText(path, data); err != nil {
		return nil, err
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	m, err = godotenv.UnmarshalBytes(data)
	if err != nil {
		// The parser's message quotes the rest of the file, secrets and all;
		// from how much it quotes it follows where it stopped.
		p := problems{file: path}
		p.at(envErrorLine(data), 0, "not a NAME=value line; put values with blanks or # in quotes, and close every quote")
		return nil, p.err()
	}
	for name, val := range m {
		if why := badEnv(name, val); why != "" {
			return nil, &Error{[]Problem{{File: path, Text: why}}}
		}
	}
	return m, nil
}

// envErrorLine is the line at which reading stops: the line after the longest
// run of lines from the top that can be read.
func envErrorLine(data []byte) int {
	lines := bytes.SplitAfter(data, []byte("\n"))
	good := 0
	// Only so many tries: each one reads from the top.
	for i := range lines[:min(len(lines), 2000)] {
		var n int
		for _, l := range lines[:i+1] {
			n += len(l)
		}
		if _, err := godotenv.UnmarshalBytes(data[:n]); err == nil {
			good = i + 1
		}
		if i-good > 50 {
			break
		}
	}
	return good + 1
}
