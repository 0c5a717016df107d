package config

import (
	"fmt"
	"strconv"
	"strings"
)

// surge is a number or a percentage.
type surge string

func (s *surge) decodeNode(d *decoder, n *node, what string) {
	if _, err := ResolveSurge(n.text, 1); !n.scalar() || n.text == "" || err != nil {
		d.wrong(n, what, `a number such as 1, or a percentage such as "25%"`)
		return
	}
	*s = surge(n.text)
}

// ResolveSurge says how many instances of an app of that many a max_surge
// ("2", "25%") lets be replaced at a time. A percentage is rounded up; 0 means
// that the old instance is stopped first.
func ResolveSurge(s string, instances int) (int, error) {
	t := strings.TrimSpace(s)
	digits, percent := strings.CutSuffix(t, "%")
	n, err := strconv.Atoi(digits)
	most := maxInstances
	if percent {
		most = 100
	}
	if err != nil || n < 0 || n > most || digits[0] == '+' {
		return 0, fmt.Errorf("max_surge: %s is neither a number from 0 to %d nor a percentage from 0%% to 100%%", clip(s), maxInstances)
	}
	if percent {
		n = (n*instances + 99) / 100
	}
	return n, nil
}
