package config

import (
	"fmt"
	"strings"
)

// momentLayout turns a format of moment.js or day.js, which PM2's
// log_date_format is, into a Go time layout. Tokens that Go cannot do come
// back in bad and stand in the layout as they are.
func momentLayout(s string) (layout string, bad []string) {
	// Longest first, as moment reads them.
	tokens := []struct{ moment, golang string }{
		{"YYYY", "2006"}, {"YY", "06"},
		{"MMMM", "January"}, {"MMM", "Jan"}, {"MM", "01"}, {"M", "1"},
		{"DDDD", "002"}, {"DDD", ""}, {"DD", "02"}, {"Do", ""}, {"D", "2"},
		{"dddd", "Monday"}, {"ddd", "Mon"}, {"dd", ""}, {"d", ""},
		{"HH", "15"}, {"H", ""}, {"hh", "03"}, {"h", "3"}, {"kk", ""}, {"k", ""},
		{"mm", "04"}, {"m", "4"}, {"ss", "05"}, {"s", "5"},
		{"SSSSSSSSS", "000000000"}, {"SSSSSS", "000000"}, {"SSS", "000"}, {"SS", "00"}, {"S", "0"},
		{"A", "PM"}, {"a", "pm"}, {"ZZ", "-0700"}, {"Z", "-07:00"}, {"z", "MST"},
		{"X", ""}, {"x", ""}, {"Qo", ""}, {"Q", ""}, {"wo", ""}, {"ww", ""}, {"w", ""}, {"Wo", ""}, {"WW", ""}, {"W", ""}, {"E", ""}, {"e", ""},
		{"gggg", ""}, {"gg", ""}, {"GGGG", ""}, {"GG", ""},
		{"LTS", "3:04:05 PM"}, {"LT", "3:04 PM"}, {"LLLL", "Monday, January 2, 2006 3:04 PM"}, {"LLL", "January 2, 2006 3:04 PM"}, {"LL", "January 2, 2006"}, {"L", "01/02/2006"},
	}
	var b strings.Builder
next:
	for i := 0; i < len(s); {
		if s[i] == '[' { // [text] is text
			if end := strings.IndexByte(s[i:], ']'); end > 0 {
				b.WriteString(s[i+1 : i+end])
				i += end + 1
				continue
			}
		}
		for _, t := range tokens {
			if !strings.HasPrefix(s[i:], t.moment) {
				continue
			}
			switch {
			case t.golang == "":
				bad = append(bad, t.moment)
				b.WriteString(t.moment)
			case t.moment[0] == 'S':
				// Go knows fractions after a point or comma only.
				if out := b.String(); !strings.HasSuffix(out, ".") && !strings.HasSuffix(out, ",") {
					bad = append(bad, t.moment+" without a point before it")
				}
				b.WriteString(t.golang)
			default:
				b.WriteString(t.golang)
			}
			i += len(t.moment)
			continue next
		}
		b.WriteByte(s[i])
		i++
	}
	return b.String(), bad
}

func momentWarning(bad []string) string {
	return fmt.Sprintf("log_date_format: %s cannot be written here and stays as it is", strings.Join(bad, ", "))
}
