package config

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Formats of a [File].
const (
	FormatRemuda   = "remuda"   // remuda.yaml
	FormatPM2      = "pm2"      // ecosystem.config.* and other PM2 process files
	FormatProcfile = "procfile" // Procfile
)

// File is what one file asks for: complete, valid apps and pools in the order of
// the file, and the groups some of the apps belong to.
type File struct {
	Path   string // absolute; "" where the bytes came from elsewhere
	Format string // FormatRemuda, FormatPM2 or FormatProcfile
	Apps   []App
	Pools  []Pool
	Groups []Group
	Daemon Daemon
}

// Daemon is what a file says of the daemon rather than of one app.
type Daemon struct {
	// Logs are the file's defaults; they are in each app's Logs already.
	Logs Logs
}

// Warning is something a file says that is not carried out, or that is
// probably not meant.
type Warning struct {
	File string // as in File.Path; "" for a command line
	Line int    // 0 where not known
	Key  string // the key or flag it is about, "" for none
	Text string // a whole sentence, one line
}

// String is "file:line: text".
func (w Warning) String() string { return position(w.File, w.Line, 0) + w.Text }

// Problem is one thing that is wrong, and where.
type Problem struct {
	File      string
	Line, Col int // 0 where not known
	Text      string
}

// String is "file:line:col: text".
func (p Problem) String() string { return position(p.File, p.Line, p.Col) + p.Text }

// Error is everything found wrong with one input, in the order of the file
// (the first 20 problems).
type Error struct{ Problems []Problem }

// Error is one line for each problem.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// ErrNotFound is what [Find] and [Load] return, wrapped, where there is no
// file.
var ErrNotFound = errors.New("no process file found")

// LoadOptions are the circumstances a file is read in. The zero value is
// useful.
type LoadOptions struct {
	// Env picks the env_<Env> mappings (--env production).
	Env string
	// Only keeps the apps of these names (--only); a name that is not in the
	// file is an error.
	Only []string
	// Environ is the caller's environment, as os.Environ gives it; nil means
	// os.Environ(). Variables are looked up in it, and apps of PM2 files and
	// Procfiles take it over.
	Environ []string
	// Cwd is the caller's working directory, "" for the process's own. PM2
	// resolves relative paths of its files against it.
	Cwd string
	// NodePath is the node that evaluates .js files, "" to look for one in
	// PATH of Environ. "none" uses the built-in interpreter.
	NodePath string
	// NoCheck leaves out the looks at the file system for programs and
	// working directories: for down, stop and delete, which need names only.
	NoCheck bool
}

func position(file string, line, col int) string {
	switch {
	case file == "" && line == 0:
		return ""
	case file == "":
		return fmt.Sprintf("line %d: ", line)
	case line == 0:
		return file + ": "
	case col == 0:
		return fmt.Sprintf("%s:%d: ", file, line)
	}
	return fmt.Sprintf("%s:%d:%d: ", file, line, col)
}

// complete fills in what was left to the process's own circumstances.
func (o *LoadOptions) complete() error {
	if o.Environ == nil {
		o.Environ = os.Environ()
	}
	if o.Cwd == "" {
		wd, err := os.Getwd()
		if err != nil {
			return fmt.Errorf("find the working directory: %w", err)
		}
		o.Cwd = wd
	}
	if !filepath.IsAbs(o.Cwd) {
		abs, err := filepath.Abs(o.Cwd)
		if err != nil {
			return fmt.Errorf("find the working directory: %w", err)
		}
		o.Cwd = abs
	}
	return nil
}

// Load reads the file at path, of whatever format, as its name and shape say.
//
// A .js, .cjs or .mjs file is a program and is run, by node where there is
// one: call Load in the process of the person whose file it is, never in a
// daemon that has more rights than they.
//
// What is wrong comes back as *[Error], all of it at once. Warnings are there
// with an error too. It is safe for concurrent use.
func Load(ctx context.Context, path string, opts LoadOptions) (*File, []Warning, error) {
	if err := opts.complete(); err != nil {
		return nil, nil, err
	}
	path = absPath(opts.Cwd, path, "")
	data, err := readBounded(path)
	switch {
	case isNotExist(err):
		return nil, nil, fmt.Errorf("%s does not exist: %w", path, ErrNotFound)
	case err != nil:
		return nil, nil, fmt.Errorf("%s: %w", path, reason(err))
	}
	return load(ctx, path, filepath.Dir(path), data, opts)
}

// Parse is [Load] for bytes that are in memory already (standard input). name
// is for messages, and decides the format where it has a known ending; a
// JavaScript file cannot be read this way. Paths in it are relative to
// opts.Cwd.
func Parse(ctx context.Context, name string, data []byte, opts LoadOptions) (*File, []Warning, error) {
	if err := opts.complete(); err != nil {
		return nil, nil, err
	}
	if isJS(name) {
		return nil, nil, fmt.Errorf("%s: JavaScript is only read from a file", name)
	}
	f, warnings, err := load(ctx, name, opts.Cwd, data, opts)
	if f != nil {
		f.Path = ""
		for i := range f.Apps {
			f.Apps[i].Source = ""
		}
		for i := range f.Pools {
			f.Pools[i].Source = ""
		}
	}
	return f, warnings, err
}

func isJS(name string) bool {
	switch filepath.Ext(name) {
	case ".js", ".cjs", ".mjs":
		return true
	}
	return false
}

func load(ctx context.Context, path, dir string, data []byte, opts LoadOptions) (*File, []Warning, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	base := filepath.Base(path)
	environ := environMap(opts.Environ)
	p := problems{file: path}
	var f *File
	var warnings []Warning
	// blame puts a problem between apps where it belongs.
	blame := func(setProblem) (line, col int) { return 0, 0 }
	ext := strings.ToLower(filepath.Ext(base))
	if isProcfile(base) {
		if err := checkText(path, data); err != nil {
			return nil, nil, err
		}
		l := &procfileLoader{problems: p, dir: dir, opts: opts, environ: environ}
		f = l.load(data)
		p = l.problems
	} else {
		root, src, err := parseTree(ctx, path, data, opts)
		if err != nil {
			return nil, nil, err
		}
		if isRemuda(base, ext, root) {
			l := &remudaLoader{decoder: decoder{problems: p}, dir: dir, opts: opts, environ: environ}
			f = l.load(root)
			p, warnings = l.problems, l.warnings
			blame = func(s setProblem) (int, int) { return remudaPosition(root, f, s) }
		} else {
			l := &pm2Loader{problems: p, src: src, dir: dir, opts: opts, environ: environ}
			f = l.load(root)
			p, warnings = l.problems, l.warnings
		}
	}
	slices.SortStableFunc(warnings, func(a, b Warning) int { return a.Line - b.Line })
	if len(p.list) == 0 {
		for _, s := range validateSet(f.Apps, f.Groups, nil) {
			line, col := blame(s)
			p.at(line, col, "%s", s.text)
		}
	}
	if err := p.err(); err != nil {
		return nil, warnings, err
	}
	f.Path = path
	if err := f.only(opts.Only); err != nil {
		return nil, warnings, err
	}
	return f, warnings, nil
}

// parseTree reads the syntax; src is the source of a .js file.
func parseTree(ctx context.Context, path string, data []byte, opts LoadOptions) (root *node, src string, err error) {
	switch ext := strings.ToLower(filepath.Ext(path)); {
	case isJS(path):
		if err := checkText(path, data); err != nil {
			return nil, "", err
		}
		root, err = evalJS(ctx, path, opts)
		return root, string(data), err
	case ext == ".yaml" || ext == ".yml":
		root, err = parseYAML(path, data)
		return root, "", err
	case ext == ".json" || ext == ".json5" || ext == ".jsonc":
		root, err = parseJSON(path, data)
		return root, "", err
	}
	// Of an unknown name, such as standard input: JSON begins with a bracket
	// or a comment, and what else there is is YAML.
	if t := strings.TrimSpace(string(data)); strings.HasPrefix(t, "{") || strings.HasPrefix(t, "[") || strings.HasPrefix(t, "//") || strings.HasPrefix(t, "/*") {
		root, err = parseJSON(path, data)
		return root, "", err
	}
	root, err = parseYAML(path, data)
	return root, "", err
}

func isProcfile(base string) bool {
	return base == "Procfile" || strings.HasPrefix(base, "Procfile.") || strings.HasSuffix(base, ".procfile")
}

// isRemuda tells the two formats apart: by name where it says so, else by
// apps, which is a mapping in one and a list in the other.
func isRemuda(base, ext string, root *node) bool {
	switch {
	case isJS(base):
		return false
	case strings.HasPrefix(base, "remuda."), strings.HasSuffix(strings.TrimSuffix(base, ext), ".remuda"):
		return true
	case strings.HasPrefix(base, "ecosystem."), strings.HasPrefix(base, "pm2."):
		return false
	case root == nil || root.kind != kMap:
		return false
	}
	if apps := root.get("apps"); apps != nil {
		// A single PM2 app under apps has a script.
		return apps.kind == kMap && apps.get("script") == nil || apps.kind == kNull
	}
	return root.get("script") == nil && root.get("pm2") == nil && root.get("exec") == nil && root.get("cmd") == nil
}

// remudaPosition is where in remuda.yaml a problem between apps stands.
func remudaPosition(root *node, f *File, s setProblem) (line, col int) {
	under, name := root.get("groups"), s.group
	if s.app >= 0 {
		under, name = root.get("apps"), f.Apps[s.app].Name
	}
	if under == nil {
		return 0, 0
	}
	line, col = find(under, name, under.line, under.col)
	for _, fl := range under.fields {
		if fl.key == name {
			return find(fl.val, s.path, fl.line, fl.col)
		}
	}
	return line, col
}

// only keeps the apps and pools of these names, and the groups they are in.
func (f *File) only(names []string) error {
	names = splitOnly(names)
	if len(names) == 0 {
		return nil
	}
	p := problems{file: f.Path}
	for _, name := range names {
		if !slices.Contains(appNames(f.Apps), name) && !slices.Contains(poolNames(f.Pools), name) {
			p.at(0, 0, "%s", f.noSuch(name))
		}
	}
	f.Apps = slices.DeleteFunc(f.Apps, func(a App) bool { return !slices.Contains(names, a.Name) })
	f.Pools = slices.DeleteFunc(f.Pools, func(p Pool) bool { return !slices.Contains(names, p.Name) })
	return p.err()
}

func splitOnly(list []string) []string {
	var out []string
	for _, s := range list {
		for n := range strings.SplitSeq(s, ",") {
			if n = strings.TrimSpace(n); n != "" {
				out = append(out, n)
			}
		}
	}
	return out
}

// Find is the path of the process file in dir: remuda.yaml, else PM2's
// ecosystem.config.* or pm2.config.*, else Procfile. Where there is none the
// error wraps [ErrNotFound] and says what was looked for.
func Find(dir string) (string, error) {
	names := []string{"remuda.yaml", "remuda.yml", "remuda.json"}
	for _, stem := range []string{"ecosystem.config", "pm2.config", "ecosystem"} {
		for _, ext := range []string{".js", ".cjs", ".mjs", ".json", ".yaml", ".yml"} {
			names = append(names, stem+ext)
		}
	}
	names = append(names, "Procfile")
	for _, name := range names {
		path := filepath.Join(dir, name)
		st, err := os.Stat(path)
		if err == nil && st.Mode().IsRegular() {
			return path, nil
		}
		if err != nil && !isNotExist(err) {
			return "", fmt.Errorf("look for a process file: %s: %w", path, reason(err))
		}
	}
	return "", fmt.Errorf("%w in %s: looked for remuda.yaml, ecosystem.config.js (.cjs, .mjs, .json, .yaml), pm2.config.js and Procfile", ErrNotFound, dir)
}

// IsFile reports whether an argument of start names a process file rather
// than a program: by its name alone, as PM2 does.
func IsFile(name string) bool {
	base := filepath.Base(name)
	switch strings.ToLower(filepath.Ext(base)) {
	case ".json", ".json5", ".jsonc", ".yaml", ".yml":
		return true
	case ".js", ".cjs", ".mjs":
		stem := strings.TrimSuffix(base, filepath.Ext(base))
		return strings.HasSuffix(stem, ".config")
	}
	return isProcfile(base)
}
