package config

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dop251/goja"
)

const (
	nodeTimeout = 10 * time.Second
	gojaTimeout = 5 * time.Second
	// gojaMemory is how much the heap may grow while the built-in interpreter
	// runs.
	gojaMemory = 128 << 20
)

// evalJS runs a .js, .cjs or .mjs process file and returns what it exports.
func evalJS(ctx context.Context, path string, opts LoadOptions) (*node, error) {
	nodePath := opts.NodePath
	if nodePath == "" {
		nodePath, _ = lookPath("node", environMap(opts.Environ)["PATH"], opts.Cwd)
	}
	var data []byte
	var err error
	if nodePath != "" && nodePath != "none" {
		data, err = evalNode(ctx, nodePath, path, opts)
	} else {
		data, err = evalGoja(ctx, path, opts)
	}
	if err != nil {
		return nil, err
	}
	n, err := parseJSON(path, data)
	if err != nil {
		return nil, &Error{[]Problem{{File: path, Text: "what the file exports cannot be read: " + err.Error()}}}
	}
	forgetPositions(n)
	return n, nil
}

// forgetPositions removes positions in text that nobody sees.
func forgetPositions(n *node) {
	if n == nil {
		return
	}
	n.line, n.col = 0, 0
	for _, e := range n.list {
		forgetPositions(e)
	}
	for i := range n.fields {
		n.fields[i].line, n.fields[i].col = 0, 0
		forgetPositions(n.fields[i].val)
	}
}

// The replacer keeps regular expressions, which JSON has no form for, and
// values whose JSON would be an error. BigInts become text.
const jsStringify = `function (value) {
  return JSON.stringify(value, function (key, v) {
    var raw = this[key];
    if (Object.prototype.toString.call(raw) === '[object RegExp]') return {"` + regexKey + `": raw.source};
    if (typeof v === 'bigint') return String(v);
    if (typeof v === 'number' && !isFinite(v)) return String(v);
    return v;
  });
}`

// nodeDriver imports the file and writes its export to descriptor 3, which
// console.log in the file does not reach.
const nodeDriver = `
const stringify = ` + jsStringify + `;
const send = (kind, text) => {
  const b = Buffer.from(JSON.stringify({kind, text}) + '\n');
  for (let o = 0; o < b.length;) o += require('fs').writeSync(3, b, o);
};
const fail = (e) => {
  send('error', String(e && e.stack || e).slice(0, 8000) + '\n' + String(e && e.message || '').slice(0, 2000));
  process.exit(1);
};
process.on('uncaughtException', fail);
process.on('unhandledRejection', fail);
const file = process.argv[1];
(async () => {
  let v = await import(require('url').pathToFileURL(file).href);
  if ('default' in v) v = v.default;
  if (typeof v === 'function') v = v();
  v = await v;
  const s = stringify(v);
  send('value', s === undefined ? 'null' : s);
  process.exit(0);
})().catch(fail);
`

func evalNode(ctx context.Context, nodePath, path string, opts LoadOptions) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	fail := func(format string, args ...any) error {
		return &Error{[]Problem{{File: path, Text: oneLine(fmt.Sprintf(format, args...))}}}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("run node: %w", err)
	}
	defer r.Close()
	var stderr tail
	cmd := exec.CommandContext(ctx, nodePath, "-e", nodeDriver, path)
	cmd.Dir = opts.Cwd
	cmd.Env = opts.Environ
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{w}
	// The file may start programs of its own; the timeout is for them too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("run node to read %s: %w", path, err)
	}
	type answer struct {
		data []byte
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		data, err := io.ReadAll(io.LimitReader(r, 2*maxFile+1))
		if len(data) > 2*maxFile {
			cancel() // node would wait for ever for a reader
		}
		got <- answer{data, err}
	}()
	waitErr := cmd.Wait()
	// A program the file left behind may hold the pipe open; what node wrote
	// is in it by now.
	if err := r.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		r.Close()
	}
	a := <-got
	switch {
	case len(a.data) > 2*maxFile:
		return nil, fail("what the file exports is larger than %d MiB", maxFile>>20)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, fail("the file did not end within %s when run by node; it must only describe apps", nodeTimeout)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	var msg struct{ Kind, Text string }
	if line, _, ok := bytes.Cut(a.data, []byte("\n")); !ok || json.Unmarshal(line, &msg) != nil {
		why := "without exporting anything"
		if s := stderr.last(); s != "" {
			why = s
		}
		if waitErr != nil {
			why = waitErr.Error() + ": " + why
		}
		return nil, fail("node ended %s", strings.TrimPrefix(why, "ended "))
	}
	if msg.Kind == "error" {
		return nil, jsError(path, msg.Text)
	}
	return []byte(msg.Text), nil
}

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	const keep = 4 << 10
	t.b = append(t.b, p[max(0, len(p)-keep):]...)
	t.b = t.b[max(0, len(t.b)-keep):]
	return len(p), nil
}

func (t *tail) last() string {
	lines := strings.Split(strings.TrimSpace(string(t.b)), "\n")
	return lines[len(lines)-1]
}

// jsError makes one line with a position of a stack trace of JavaScript.
func jsError(path, stack string) error {
	p := problems{file: path}
	line, col := 0, 0
	quoted := regexp.QuoteMeta(path)
	// Node percent-encodes what is unusual in URLs; the name is mostly enough.
	name := regexp.QuoteMeta(filepath.Base(path))
	for _, re := range []string{quoted + `:(\d+)(?::(\d+))?`, `/` + name + `:(\d+)(?::(\d+))?`} {
		if m := regexp.MustCompile(re).FindStringSubmatch(stack); m != nil {
			line, _ = strconv.Atoi(m[1])
			col, _ = strconv.Atoi(m[2])
			break
		}
	}
	// The line with the error's name is the message; a syntax error has the
	// source in front of it.
	msg := ""
	errLine := regexp.MustCompile(`^(\w*(?:Error|Exception)\b.*)$`)
	for l := range strings.SplitSeq(stack, "\n") {
		if m := errLine.FindStringSubmatch(strings.TrimSpace(l)); m != nil {
			msg = m[1]
			break
		}
	}
	if msg == "" {
		msg, _, _ = strings.Cut(strings.TrimSpace(stack), "\n")
	}
	// goja writes positions into its messages.
	if m := regexp.MustCompile(`(?:` + quoted + `: )?Line (\d+):(\d+) `).FindStringSubmatch(msg); m != nil && line == 0 {
		line, _ = strconv.Atoi(m[1])
		col, _ = strconv.Atoi(m[2])
		msg = strings.Replace(msg, m[0], "", 1)
	}
	msg = regexp.MustCompile(` at (?:\S+ \()?(?:`+quoted+`|<eval>):\d+:\d+.*$`).ReplaceAllString(msg, "")
	if strings.Contains(msg, "is not defined in ES module scope") {
		msg += " (the package.json above says type: module; name the file .cjs)"
	}
	p.at(line, col, "%s", msg)
	return p.err()
}

// evalGoja runs the file in the built-in interpreter, which has CommonJS
// modules beside the file, path, os, process.env and console, and is stopped
// when it takes too long or too much.
func evalGoja(ctx context.Context, path string, opts LoadOptions) ([]byte, error) {
	src, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, reason(err))
	}
	return runGoja(ctx, path, src, opts, gojaTimeout)
}

func runGoja(ctx context.Context, path string, src []byte, opts LoadOptions, timeout time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	h := &gojaHost{vm: goja.New(), opts: opts, modules: map[string]*goja.Object{}}
	h.vm.SetMaxCallStackSize(500)
	type answer struct {
		data []byte
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				done <- answer{nil, &Error{[]Problem{{File: path, Text: oneLine(fmt.Sprintf("the built-in JavaScript cannot run the file (%.200v); install node", r))}}}}
			}
		}()
		data, err := h.export(path, src)
		done <- answer{data, err}
	}()
	stopWatch := make(chan struct{})
	defer close(stopWatch)
	go watchHeap(h.vm, stopWatch)
	select {
	case a := <-done:
		return a.data, a.err
	case <-ctx.Done():
	}
	h.vm.Interrupt("timeout")
	// Between two instructions an interrupt works at once; within one that
	// takes for ever (a regular expression) it does not, and the goroutine is
	// left to the end of this short-lived process.
	select {
	case <-done:
	case <-time.After(time.Second):
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, &Error{[]Problem{{File: path, Text: fmt.Sprintf("the file did not end within %s; it must only describe apps", timeout)}}}
	}
	return nil, ctx.Err()
}

// watchHeap interrupts vm when the heap has grown by more than gojaMemory.
func watchHeap(vm *goja.Runtime, stop <-chan struct{}) {
	heap := func() uint64 {
		s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(s)
		if s[0].Value.Kind() != metrics.KindUint64 {
			return 0
		}
		return s[0].Value.Uint64()
	}
	before := heap()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-t.C:
			if heap() > before+gojaMemory {
				vm.Interrupt("memory")
				return
			}
		}
	}
}

type gojaHost struct {
	vm      *goja.Runtime
	opts    LoadOptions
	modules map[string]*goja.Object
	files   int
}

func (h *gojaHost) export(path string, src []byte) ([]byte, error) {
	// goja builds long strings in one instruction, which no interrupt stops.
	_, err := h.vm.RunString(`(function () {
  var max = 1 << 24;
  ['repeat', 'padStart', 'padEnd'].forEach(function (name) {
    var real = String.prototype[name];
    Object.defineProperty(String.prototype, name, {value: function (n, s) {
      if ((name === 'repeat' ? String(this).length * n : n) > max) throw new RangeError('the string would be too long');
      return real.call(this, n, s);
    }});
  });
  var fill = Array.prototype.fill;
  Object.defineProperty(Array.prototype, 'fill', {value: function (v, a, b) {
    if (this.length > max) throw new RangeError('the array would be too long');
    return fill.call(this, v, a, b);
  }});
})()`)
	if err != nil {
		return nil, fmt.Errorf("set up the JavaScript interpreter: %w", err)
	}
	h.globals()
	v, err := h.module(path, src)
	if err != nil {
		return nil, h.err(path, err)
	}
	if fn, ok := goja.AssertFunction(v); ok {
		if v, err = fn(goja.Undefined()); err != nil {
			return nil, h.err(path, err)
		}
	}
	if p, ok := v.Export().(*goja.Promise); ok {
		switch p.State() {
		case goja.PromiseStateFulfilled:
			v = p.Result()
		case goja.PromiseStateRejected:
			return nil, &Error{[]Problem{{File: path, Text: oneLine(p.Result().String())}}}
		default:
			return nil, &Error{[]Problem{{File: path, Text: "the file exports a promise that is not settled; install node, or export a plain object"}}}
		}
	}
	sv, err := h.vm.RunString("(" + jsStringify + ")")
	if err != nil {
		return nil, h.err(path, err)
	}
	stringify, ok := goja.AssertFunction(sv)
	if !ok {
		return nil, errors.New("set up the JavaScript interpreter: stringify is no function")
	}
	out, err := stringify(goja.Undefined(), v)
	if err != nil {
		return nil, h.err(path, err)
	}
	if goja.IsUndefined(out) {
		return []byte("null"), nil
	}
	return []byte(out.String()), nil
}

func (h *gojaHost) err(path string, err error) error {
	var stop *goja.InterruptedError
	if errors.As(err, &stop) {
		text := "the file was stopped"
		if stop.Value() == "memory" {
			text = fmt.Sprintf("the file takes more than %d MiB; it must only describe apps", gojaMemory>>20)
		}
		return &Error{[]Problem{{File: path, Text: text}}}
	}
	var deep *goja.StackOverflowError
	if errors.As(err, &deep) {
		return jsError(path, "RangeError: functions of the file call each other without end\n"+deep.String())
	}
	var ex *goja.Exception
	if errors.As(err, &ex) {
		return jsError(path, ex.Error()+"\n"+ex.String())
	}
	return jsError(path, err.Error())
}

func (h *gojaHost) globals() {
	set := func(o *goja.Object, name string, v any) {
		// Set fails on frozen objects only, which these are not.
		_ = o.Set(name, v)
	}
	console := h.vm.NewObject()
	for _, name := range []string{"log", "info", "warn", "error", "debug"} {
		set(console, name, func(goja.FunctionCall) goja.Value { return goja.Undefined() })
	}
	g := h.vm.GlobalObject()
	set(g, "console", console)
	env := h.vm.NewObject()
	for name, val := range environMap(h.opts.Environ) {
		set(env, name, val)
	}
	process := h.vm.NewObject()
	set(process, "env", env)
	set(process, "platform", "linux")
	set(process, "argv", []string{"node"})
	set(process, "cwd", func() string { return h.opts.Cwd })
	set(process, "versions", map[string]string{})
	set(g, "process", process)
	set(g, "global", g)
}

// module runs one CommonJS module and returns its exports.
func (h *gojaHost) module(path string, src []byte) (goja.Value, error) {
	if h.files++; h.files > 200 {
		return nil, errors.New("more than 200 files are required")
	}
	text := string(bytes.TrimPrefix(src, []byte("\ufeff")))
	if strings.HasPrefix(text, "#!") {
		text = "//" + text
	}
	// The one form of ES modules that process files use.
	text = regexp.MustCompile(`(?m)^export\s+default\b`).ReplaceAllString(text, "module.exports =")
	if regexp.MustCompile(`(?m)^(import|export)\s+[\w*{'"]`).MatchString(text) {
		return nil, errors.New("SyntaxError: import and export need node, which is not in PATH; install it, or use require and module.exports")
	}
	prog, err := goja.Compile(path, "(function (exports, require, module, __filename, __dirname) {"+text+"\n})", false)
	if err != nil {
		return nil, err
	}
	fv, err := h.vm.RunProgram(prog)
	if err != nil {
		return nil, err
	}
	fn, ok := goja.AssertFunction(fv)
	if !ok {
		return nil, errors.New("SyntaxError: the file does not hold together as a module")
	}
	mod := h.vm.NewObject()
	exports := h.vm.NewObject()
	if err := mod.Set("exports", exports); err != nil {
		return nil, err
	}
	h.modules[path] = mod
	dir := filepath.Dir(path)
	require := func(c goja.FunctionCall) goja.Value { return h.require(dir, c.Argument(0).String()) }
	if _, err := fn(goja.Undefined(), exports, h.vm.ToValue(require), mod, h.vm.ToValue(path), h.vm.ToValue(dir)); err != nil {
		return nil, err
	}
	return mod.Get("exports"), nil
}

// require throws into the script what goes wrong.
func (h *gojaHost) require(dir, name string) goja.Value {
	throw := func(format string, args ...any) {
		panic(h.vm.NewGoError(fmt.Errorf(format, args...)))
	}
	switch strings.TrimPrefix(name, "node:") {
	case "path":
		return h.pathModule()
	case "os":
		return h.osModule()
	}
	if !strings.HasPrefix(name, "./") && !strings.HasPrefix(name, "../") && !strings.HasPrefix(name, "/") {
		throw("Error: the module %s needs node, which is not in PATH", clip(name))
	}
	base := absPath(dir, name, "")
	for _, path := range []string{base, base + ".js", base + ".cjs", base + ".json", base + "/index.js"} {
		if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() {
			continue
		}
		if mod, ok := h.modules[path]; ok {
			return mod.Get("exports")
		}
		src, err := readBounded(path)
		if err != nil {
			throw("Error: %s: %w", path, reason(err))
		}
		if filepath.Ext(path) == ".json" {
			parse, _ := goja.AssertFunction(h.vm.Get("JSON").ToObject(h.vm).Get("parse"))
			v, err := parse(goja.Undefined(), h.vm.ToValue(string(src)))
			if err != nil {
				throw("SyntaxError: %s: %w", path, err)
			}
			return v
		}
		v, err := h.module(path, src)
		if err != nil {
			var ex *goja.Exception
			if errors.As(err, &ex) {
				panic(ex.Value())
			}
			throw("%w", err)
		}
		return v
	}
	throw("Error: cannot find module %s", clip(name))
	return nil
}

func (h *gojaHost) pathModule() goja.Value {
	strs := func(c goja.FunctionCall) []string {
		out := make([]string, len(c.Arguments))
		for i, a := range c.Arguments {
			out[i] = a.String()
		}
		return out
	}
	o := h.vm.NewObject()
	for name, fn := range map[string]any{
		"join": func(c goja.FunctionCall) goja.Value { return h.vm.ToValue(filepath.Join(strs(c)...)) },
		"resolve": func(c goja.FunctionCall) goja.Value {
			p := h.opts.Cwd
			for _, s := range strs(c) {
				if s != "" {
					p = absPath(p, s, "")
				}
			}
			return h.vm.ToValue(p)
		},
		"dirname":    filepath.Dir,
		"basename":   func(p, ext string) string { return strings.TrimSuffix(filepath.Base(p), ext) },
		"extname":    filepath.Ext,
		"normalize":  filepath.Clean,
		"isAbsolute": filepath.IsAbs,
		"relative": func(from, to string) string {
			rel, err := filepath.Rel(absPath(h.opts.Cwd, from, ""), absPath(h.opts.Cwd, to, ""))
			if err != nil {
				return to
			}
			return strings.TrimPrefix(rel, ".")
		},
		"sep":       "/",
		"delimiter": ":",
	} {
		_ = o.Set(name, fn)
	}
	return o
}

func (h *gojaHost) osModule() goja.Value {
	env := environMap(h.opts.Environ)
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	list := make([]any, cpus())
	for i := range list {
		list[i] = map[string]any{"model": "", "speed": 0}
	}
	o := h.vm.NewObject()
	for name, fn := range map[string]any{
		"cpus":                 func() []any { return list },
		"availableParallelism": cpus,
		"hostname":             func() string { return host },
		"homedir":              func() string { return env["HOME"] },
		"tmpdir":               func() string { return orElse(env["TMPDIR"], "/tmp") },
		"platform":             func() string { return "linux" },
		"type":                 func() string { return "Linux" },
		"EOL":                  "\n",
	} {
		_ = o.Set(name, fn)
	}
	return o
}
