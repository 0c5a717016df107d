package config

import (
	"fmt"
	"maps"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Diff says in words what differs between two specs of one app, one string
// per field: "env.PORT: 80 → 81". Empty means the same. Values of variables
// that look secret are never shown, and variables that an app took over from
// its caller's environment do not count. Nor does Source.
func Diff(old, updated App) []string {
	var d differ
	a, b := reflect.ValueOf(old), reflect.ValueOf(updated)
	for i := range a.NumField() {
		switch name := jsonName(a.Type().Field(i)); name {
		case "env":
			d.env(&old, &updated)
		case "source", "env_keys":
		default:
			d.value(name, a.Field(i), b.Field(i))
		}
	}
	return d.list
}

func jsonName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

type differ struct{ list []string }

func (d *differ) add(path, from, to string) {
	d.list = append(d.list, fmt.Sprintf("%s: %s → %s", path, from, to))
}

func (d *differ) value(path string, a, b reflect.Value) {
	switch a.Kind() {
	case reflect.Pointer:
		switch {
		case a.IsNil() && b.IsNil():
		case a.IsNil():
			d.add(path, "off", "on")
		case b.IsNil():
			d.add(path, "on", "off")
		default:
			d.value(path, a.Elem(), b.Elem())
		}
	case reflect.Struct:
		for i := range a.NumField() {
			d.value(path+"."+jsonName(a.Type().Field(i)), a.Field(i), b.Field(i))
		}
	case reflect.Map:
		for _, k := range unionKeys(a, b) {
			d.pair(path+"."+k, mapEntry(a, k), mapEntry(b, k))
		}
	case reflect.Slice:
		if a.Len() != b.Len() || !slices.Equal(elems(a), elems(b)) {
			d.add(path, show(a), show(b))
		}
	default:
		if a.Interface() != b.Interface() {
			d.add(path, show(a), show(b))
		}
	}
}

func (d *differ) pair(path string, a, b *string) {
	switch {
	case a == nil && b == nil, a != nil && b != nil && *a == *b:
	case a == nil:
		d.add(path, "unset", shortValue(*b))
	case b == nil:
		d.add(path, shortValue(*a), "unset")
	default:
		d.add(path, shortValue(*a), shortValue(*b))
	}
}

// env compares what the two specs say themselves. A variable that only one
// of them says is compared with what the other inherited.
func (d *differ) env(old, updated *App) {
	own := func(a *App) map[string]bool {
		m := map[string]bool{}
		keys := a.EnvKeys
		if a.EnvKeys == nil {
			keys = slices.Collect(maps.Keys(a.Env))
		}
		for _, k := range keys {
			m[k] = true
		}
		return m
	}
	a, b := own(old), own(updated)
	all := maps.Clone(a)
	maps.Copy(all, b)
	for _, k := range slices.Sorted(maps.Keys(all)) {
		x, inOld := old.Env[k]
		y, inNew := updated.Env[k]
		inOld, inNew = inOld && (a[k] || b[k]), inNew && (a[k] || b[k])
		if inOld == inNew && x == y {
			continue
		}
		if SecretName(k) || secretValue(x) || secretValue(y) {
			what := "changed"
			if !inOld {
				what = "added"
			} else if !inNew {
				what = "removed"
			}
			d.list = append(d.list, fmt.Sprintf("env.%s: %s (value hidden)", k, what))
			continue
		}
		var px, py *string
		if inOld {
			px = &x
		}
		if inNew {
			py = &y
		}
		d.pair("env."+k, px, py)
	}
}

// SecretName reports whether a variable of this name is likely to hold a
// secret: its value is shown nowhere.
func SecretName(name string) bool {
	up := strings.ToUpper(name)
	for _, part := range []string{"SECRET", "PASSW", "PASSPHRASE", "TOKEN", "CREDENTIAL", "PRIVATE", "APIKEY", "API_KEY", "ACCESS_KEY", "COOKIE", "SESSION_KEY", "SIGNING", "ENCRYPTION", "WEBHOOK", "DSN", "_SALT"} {
		if strings.Contains(up, part) {
			return true
		}
	}
	for word := range strings.FieldsFuncSeq(up, func(r rune) bool { return r == '_' || r == '-' || r == '.' }) {
		if slices.Contains([]string{"KEY", "PASS", "PWD", "PW", "AUTH", "PIN", "JWT", "PAT", "CERT", "SALT"}, word) && up != "PWD" && up != "OLDPWD" {
			return true
		}
	}
	return false
}

// secretValue reports whether a value is a URL with a password in it.
func secretValue(s string) bool {
	if !strings.Contains(s, "://") || !strings.Contains(s, "@") {
		return false
	}
	u, err := url.Parse(s)
	if err != nil {
		return true
	}
	_, has := u.User.Password()
	return has
}

func unionKeys(a, b reflect.Value) []string {
	set := map[string]bool{}
	for _, m := range []reflect.Value{a, b} {
		for _, k := range m.MapKeys() {
			set[k.String()] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

func mapEntry(m reflect.Value, k string) *string {
	v := m.MapIndex(reflect.ValueOf(k))
	if !v.IsValid() {
		return nil
	}
	s := v.String()
	return &s
}

func elems(v reflect.Value) []string {
	out := make([]string, v.Len())
	for i := range out {
		out[i] = fmt.Sprint(v.Index(i).Interface())
	}
	return out
}

func show(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Slice:
		return shortValue(Join(elems(v)))
	case reflect.String:
		return shortValue(v.String())
	}
	return fmt.Sprint(v.Interface())
}

// shortValue is a value for one line of a terminal.
func shortValue(s string) string {
	if s == "" {
		return `""`
	}
	const most = 120
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		s = strconv.Quote(s)
	}
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + "…"
	}
	return s
}
