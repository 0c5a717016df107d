package logs

import (
	"path/filepath"
	"testing"
)

func TestPlain(t *testing.T) {
	m := newManager(t, Options{})
	path := filepath.Join(t.TempDir(), "deep", "app-out.log")
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, w, "one\ntwo")
	eventually(t, "capture", func() bool { return c.Stats().Bytes == 7 })
	if got := content(t, path); got != "one\ntwo" {
		t.Fatalf("got %q", got)
	}
	finish(t, c)
	if got := content(t, path); got != "one\ntwo\n" {
		t.Fatalf("got %q", got)
	}
}
