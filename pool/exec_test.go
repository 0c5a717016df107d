package pool

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
)

// A task may bring arguments; what the program printed is there when it failed.
func TestExecArgs(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := newPool(t, Options{Command: []string{"/bin/sh", "-c", `echo "instead"`}, Protocol: Exec, Size: 1, Stderr: w})
	do := func(args []string, body string) (string, error) {
		res, err := p.Do(context.Background(), Task{Args: args, Body: []byte(body)})
		return string(res.Body), err
	}
	if got, err := do([]string{"-c", `cat; echo "$0 $1"`, "a b", "$HOME;*"}, ""); got != "a b $HOME;*\n" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := do([]string{"-c", "cat"}, "in"); got != "in" || err != nil {
		t.Errorf("with a body: %q, %v", got, err)
	}
	if got, err := do(nil, ""); got != "instead\n" || err != nil {
		t.Errorf("without arguments: %q, %v", got, err)
	}
	var te *TaskError
	got, err := do([]string{"-c", `echo out; printf 'one\ntwo' >&2; exit 3`}, "")
	if got != "out\n" || !errors.As(err, &te) || te.Code != "exit" {
		t.Errorf("failed: %q, %v", got, err)
	}
	for _, arg := range []string{"a\x00b", strings.Repeat("x", 1<<20)} {
		if _, err := do([]string{"-c", "true", arg}, ""); !errors.As(err, &te) || te.Code != "arguments" {
			t.Errorf("%.10q: %v", arg, err)
		}
	}
	w.Close()
	b := make([]byte, 100)
	if n, err := r.Read(b); string(b[:n]) != "one\n" && string(b[:n]) != "one\ntwo" {
		t.Errorf("standard error: %q, %v", b[:n], err)
	}
}

// Tasks that differ in their arguments alone are not poison for each other.
func TestExecArgsPoison(t *testing.T) {
	p := newPool(t, Options{Command: []string{"/bin/sh"}, Protocol: Exec, Size: 1, PoisonAfter: 1})
	do := func(script string) error {
		_, err := p.Do(context.Background(), Task{Args: []string{"-c", script}})
		return err
	}
	if err := do("kill -9 $$"); !errors.Is(err, ErrWorkerDied) {
		t.Error(err)
	}
	if err := do("kill -9 $$"); !errors.Is(err, ErrPoison) {
		t.Error(err)
	}
	if err := do("exit 0"); err != nil {
		t.Error(err)
	}
}
