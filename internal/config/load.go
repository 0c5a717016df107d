package config

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Formats of a [File].
const (
	FormatRemuda   = "remuda"   // remuda.yaml
	FormatPM2      = "pm2"      // ecosystem.config.* and other PM2 process files
	FormatProcfile = "procfile" // Procfile
)

// File is what one file asks for: complete, valid apps in the order of the
// file, and the groups some of them belong to.
type File struct {
	Path   string // absolute; "" where the bytes came from elsewhere
	Format string // FormatRemuda, FormatPM2 or FormatProcfile
	Apps   []App
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

// Load reads the file at path, of whatever format, as its name and shape say.
//
// A .js, .cjs or .mjs file is a program and is run, by node where there is
// one: call Load in the process of the person whose file it is, never in a
// daemon that has more rights than they.
//
// What is wrong comes back as *[Error], all of it at once.
func Load(ctx context.Context, path string, opts LoadOptions) (*File, []Warning, error) {
	return nil, nil, errors.ErrUnsupported
}

// Parse is [Load] for bytes that are in memory already (standard input). name
// decides the format where it has a known ending; data that is no YAML or
// JSON process file is read as a Procfile only if name says so. Paths in it
// are relative to opts.Cwd.
func Parse(ctx context.Context, name string, data []byte, opts LoadOptions) (*File, []Warning, error) {
	return nil, nil, errors.ErrUnsupported
}

// Find is the path of the process file in dir: remuda.yaml, else PM2's
// ecosystem.config.* or pm2.config.*, else Procfile. Where there is none the
// error wraps [ErrNotFound] and says what was looked for.
func Find(dir string) (string, error) {
	return "", errors.ErrUnsupported
}

// IsFile reports whether an argument of start names a process file rather
// than a program: by its name alone, as PM2 does.
func IsFile(name string) bool {
	return false
}

// CommandLine is `remuda start SCRIPT [flags] [-- ARGS]`: PM2's flags as the
// person gave them. Strings that are "" and slices that are nil were not
// given.
type CommandLine struct {
	Script string
	Args   []string
	Name, Namespace,
	Interpreter, // --interpreter; "none" runs Script itself
	NodeArgs, // --node-args, --interpreter-args: split like a shell's words
	Instances, // -i: "4", "max", "0", "-1"
	ExecMode, // "fork" (-x), "cluster"
	Cwd,
	Output, ErrorLog, Log, // -o, -e, -l
	LogDateFormat, LogType,
	MaxMemoryRestart, RestartDelay, ExpBackoffRestartDelay,
	MaxRestarts, MinUptime, KillTimeout, ListenTimeout,
	CronRestart, WatchDelay, UID, GID, Signal string
	Watch         []string // --watch: nil not given, empty = Cwd
	IgnoreWatch   []string
	FilterEnv     []string
	StopExitCodes []string
	Time, MergeLogs, DisableLogs, WaitReady, ShutdownWithMessage,
	NoAutorestart, NoAutostart, NoTreekill bool
	// Environ is the caller's environment; nil means os.Environ().
	Environ []string
	// Env are further variables, NAME=value, over Environ.
	Env []string
	// CallerCwd is what relative paths are relative to, "" for the process's
	// own working directory.
	CallerCwd string
}

// FromCommand turns a command line into an app, with PM2's defaults.
func FromCommand(c CommandLine) (App, []Warning, error) {
	return App{}, nil, errors.ErrUnsupported
}

// Validate reports what is wrong with a, as *[Error] without positions. Every
// app that [Load] and [FromCommand] return is valid; it is for apps that come
// over the API.
func Validate(a App) error { return errors.ErrUnsupported }

// ValidateSet checks apps against each other: names that occur twice,
// dependencies on apps that are neither among them nor known (nil: none is),
// cycles, groups.
func ValidateSet(apps []App, groups []Group, known func(name string) bool) error {
	return errors.ErrUnsupported
}

// Diff says in words what differs between two specs of one app, one string
// per field: "env.PORT: 80 → 81". Empty means the same. Values of variables
// that look secret are never shown, and variables that an app took over from
// its caller's environment do not count.
func Diff(old, updated App) []string { return nil }

// ResolveInstances turns what a person gives for a number of instances into
// one: "4", "max" or "0" (as many as CPUs), "-1" (one fewer, at least 1).
func ResolveInstances(s string) (int, error) { return 0, errors.ErrUnsupported }

// Schema is the JSON Schema of remuda.yaml.
func Schema() ([]byte, error) { return nil, errors.ErrUnsupported }
