package jsondepth

import (
	"strings"
	"testing"
)

func TestExceeds(t *testing.T) {
	for _, c := range []struct {
		in   string
		want bool
	}{
		{"", false},
		{"[[1]]", false},
		{"[[[1]]]", true},
		{`[{"a":[`, true},
		{`["[[[[", "\"[[[["]`, false},
		{`["\\", [[`, true},
		{"[][][][]", false},
		{"]]]][[", false},
		{strings.Repeat("]", 10) + strings.Repeat("[", 12), false},
	} {
		if got := Exceeds([]byte(c.in), 2); got != c.want {
			t.Errorf("Exceeds(%q, 2) = %v", c.in, got)
		}
	}
}
