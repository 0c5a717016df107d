package config

import (
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// procfileLoader reads a Procfile as foreman and honcho do: one app a line,
// the .env beside it for all, PORT 5000, 5100, …
type procfileLoader struct {
	problems
	dir     string
	opts    LoadOptions
	environ map[string]string
}

func (l *procfileLoader) load(data []byte) *File {
	f := &File{Format: FormatProcfile, Daemon: Daemon{Logs: defaultLogs()}}
	own := map[string]string{}
	m, err := readEnvFile(l.dir + "/.env")
	switch {
	case isNotExist(err):
	case err != nil:
		l.at(0, 0, "the .env beside it: %v", err)
	default:
		own = m
	}
	base := 5000
	for _, v := range []string{own["PORT"], l.environ["PORT"]} {
		if n, err := strconv.Atoi(v); err == nil && n > 0 && n < 1<<16 {
			base = n
			break
		}
	}
	seen := map[string]int{}
	num := 0
	for s := range strings.SplitSeq(strings.TrimPrefix(string(data), "\ufeff"), "\n") {
		num++
		s = strings.TrimSpace(s)
		if s == "" || s[0] == '#' {
			continue
		}
		name, command, ok := strings.Cut(s, ":")
		name, command = strings.TrimSpace(name), strings.TrimSpace(command)
		switch {
		case !ok || !procName(name):
			l.at(num, 1, "%s is not NAME: COMMAND with a name of letters, digits, _ and -", clip(s))
		case command == "":
			l.at(num, 1, "%s has no command; write %s: COMMAND", name, name)
		case seen[name] > 0:
			l.at(num, 1, "%s is there twice, the first time at line %d; rename one", name, seen[name])
		default:
			seen[name] = num
			a := l.app(name, command, base+100*len(f.Apps), own)
			for _, p := range validate(&a) {
				l.at(num, 1, "app %s: %s", clip(name), p.text)
			}
			f.Apps = append(f.Apps, a)
		}
		if len(seen) > 10_000 {
			l.at(num, 1, "more than 10000 apps in one file")
			break
		}
	}
	if len(f.Apps) == 0 && len(l.list) == 0 {
		l.at(0, 0, "the file has no apps; write lines NAME: COMMAND")
	}
	return f
}

func procName(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r != '_' && r != '-' && r != '.' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
}

func (l *procfileLoader) app(name, command string, port int, own map[string]string) App {
	a := App{
		Name: name, Namespace: "default", Cwd: l.dir, Script: command,
		Instances: 1, InstanceVar: defaultInstanceVar, IncrementVar: "PORT", ExecMode: "fork", Autostart: true,
		Restart: defaultRestart(), Stop: Stop{Signal: "SIGTERM", Grace: defaultGrace}, Ready: Probe{Type: "none"},
		Logs: defaultLogs(), Source: l.file,
	}
	own = maps.Clone(own)
	own["PORT"] = strconv.Itoa(min(port, 1<<16-1))
	a.setEnv(callerEnv(l.environ), own)
	a.Command, a.Interpreter = procCommand(command, func(prog string) bool {
		_, err := lookPath(prog, a.Env["PATH"], l.dir)
		return err == nil
	})
	if a.Interpreter == "none" && strings.Contains(a.Command[0], "/") {
		a.Command[0] = absPath(l.dir, a.Command[0], "")
	}
	return a
}

// procCommand is a Procfile's command: run as it is where a shell would add
// nothing, so that signals and exit codes are the program's own; else by
// /bin/sh, which a lone command replaces by exec.
func procCommand(command string, isProgram func(string) bool) ([]string, string) {
	if argv, err := Split(command); err == nil && len(argv) > 0 && plainProgram(argv[0]) && isProgram(argv[0]) {
		return argv, "none"
	}
	sh := command
	if argv, err := splitLoose(command); err == nil && len(argv) > 0 && plainProgram(argv[0]) && isProgram(argv[0]) &&
		!strings.ContainsAny(command, "|&;<>()`\n#") {
		sh = "exec " + command
	}
	return []string{"/bin/sh", "-c", sh}, "/bin/sh"
}

// plainProgram reports whether a first word is a program to a shell as well,
// no assignment, keyword or builtin.
func plainProgram(w string) bool {
	name, _, assign := strings.Cut(w, "=")
	return w != "" && (!assign || !envWord(name)) && !strings.ContainsAny(w, "$*~") &&
		!slices.Contains([]string{"cd", "exec", "export", "set", "unset", "source", ".", "eval", "if", "while", "until", "for", "case", "trap", "ulimit", "umask", "wait", "read", "!", "{", "exit", "return", "shift", "command", "time", ":"}, filepath.Base(w))
}
