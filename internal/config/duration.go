package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Std is d as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// String is d as [ParseDuration] reads it: "1.5s", "2m0s", "0s".
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalJSON writes d as a string such as "1.5s".
func (d Duration) MarshalJSON() ([]byte, error) {
	return strconv.AppendQuote(nil, d.String()), nil
}

// UnmarshalJSON reads "1.5s" or a number of milliseconds.
func (d *Duration) UnmarshalJSON(b []byte) error {
	s := string(b)
	if s == "null" {
		return nil
	}
	if strings.HasPrefix(s, `"`) {
		if err := json.Unmarshal(b, &s); err != nil {
			return fmt.Errorf("read duration: %w", err)
		}
	}
	v, err := ParseDuration(s)
	if err != nil {
		return err
	}
	*d = v
	return nil
}

// MarshalText writes d as "1.5s" (YAML, flags).
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what [ParseDuration] reads.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := ParseDuration(string(b))
	if err != nil {
		return err
	}
	*d = v
	return nil
}

// ParseDuration reads a duration as people write it: "500ms", "1.5s", "2m",
// "1h30m", "2d", or a bare number, which is milliseconds. Negative durations
// are read; whether they make sense is [Validate]'s to say.
func ParseDuration(s string) (Duration, error) {
	t := strings.TrimSpace(s)
	if ms, err := strconv.ParseFloat(t, 64); err == nil && plainNumber(t) {
		v := ms * float64(time.Millisecond)
		if math.IsNaN(v) || v >= math.MaxInt64 || v <= math.MinInt64 {
			return 0, fmt.Errorf("duration %s is too long", clip(s))
		}
		return Duration(math.Round(v)), nil
	}
	if v, err := time.ParseDuration(t); err == nil {
		return Duration(v), nil
	}
	if n, ok := strings.CutSuffix(t, "d"); ok {
		if days, err := strconv.ParseFloat(n, 64); err == nil && plainNumber(n) {
			if v := days * float64(24*time.Hour); v < math.MaxInt64 && v > math.MinInt64 {
				return Duration(math.Round(v)), nil
			}
		}
	}
	return 0, fmt.Errorf("%s is not a duration: write 500ms, 1.5s, 2m, 1h or a number of milliseconds", clip(s))
}

// ParseSize reads a number of bytes as people write it: "300M", "1.5GB",
// "10MiB", "64k", or a bare number. Every unit is a power of 1024, with or
// without the i, as in PM2.
func ParseSize(s string) (int64, error) {
	bad := fmt.Errorf("%s is not a size: write 300M, 1.5GB, 10MiB or a number of bytes", clip(s))
	t := strings.ToLower(strings.TrimSpace(s))
	num := strings.TrimRight(t, "bikmgtp ")
	unit := strings.TrimSpace(t[len(num):])
	shift := 0
	switch strings.TrimSuffix(strings.TrimSuffix(unit, "b"), "i") {
	case "":
		if unit != "" && unit != "b" {
			return 0, bad
		}
	case "k":
		shift = 10
	case "m":
		shift = 20
	case "g":
		shift = 30
	case "t":
		shift = 40
	case "p":
		shift = 50
	default:
		return 0, bad
	}
	if !plainNumber(num) {
		return 0, bad
	}
	if n, err := strconv.ParseInt(num, 10, 64); err == nil {
		if n > math.MaxInt64>>shift || n < math.MinInt64>>shift {
			return 0, fmt.Errorf("size %s is too large", clip(s))
		}
		return n << shift, nil
	} else if errors.Is(err, strconv.ErrRange) {
		return 0, fmt.Errorf("size %s is too large", clip(s))
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil {
		return 0, bad
	}
	f *= float64(int64(1) << shift)
	if f >= math.MaxInt64 || f <= math.MinInt64 {
		return 0, fmt.Errorf("size %s is too large", clip(s))
	}
	return int64(f), nil
}

// FormatSize writes n so that [ParseSize] reads the same number again, with
// the largest unit that loses nothing: "300M", "1536K", "1000".
func FormatSize(n int64) string {
	units := []struct {
		shift int
		name  string
	}{{50, "P"}, {40, "T"}, {30, "G"}, {20, "M"}, {10, "K"}}
	for _, u := range units {
		if n != 0 && n%(1<<u.shift) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// plainNumber keeps out what ParseFloat takes beyond decimal numbers: hex,
// exponents, underscores, Inf and NaN.
func plainNumber(s string) bool {
	digits := false
	for i, c := range s {
		switch {
		case c >= '0' && c <= '9':
			digits = true
		case c == '.', (c == '-' || c == '+') && i == 0:
		default:
			return false
		}
	}
	return digits
}

// clip quotes s for an error message, cut to a length a line can hold.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		cut := most
		for cut > 0 && s[cut]&0xC0 == 0x80 {
			cut--
		}
		return strconv.Quote(s[:cut] + "…")
	}
	return strconv.Quote(s)
}
