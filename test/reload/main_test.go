package main

import (
	"bytes"
	"testing"
)

// TestReload is a short one; `make reload` is the whole.
func TestReload(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), options{reloads: 2, kept: 20, fresh: 20, out: &out})
	t.Log("\n" + out.String())
	if err != nil {
		t.Error(err)
	}
}
