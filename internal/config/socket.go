package config

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"unicode"

	"github.com/invopop/jsonschema"
)

const (
	// maxSockets of an app; more descriptors a process may not be started with.
	maxSockets = 64
	// maxSocketPath is the kernel's.
	maxSocketPath = 107
	// maxBacklog is more than any kernel grants.
	maxBacklog = 1 << 20
)

// Socket is one that is opened for an app and handed to each of its processes,
// as systemd does: descriptors from 3 on, LISTEN_FDS, LISTEN_PID and
// LISTEN_FDNAMES.
type Socket struct {
	// Name is its name in LISTEN_FDNAMES.
	Name string `json:"name"`
	// Listen is ADDRESS:PORT (TCP), udp://ADDRESS:PORT, or the absolute path
	// of a Unix socket. The address is one of the machine's, 0.0.0.0, or [::],
	// which takes IPv4 too.
	Listen string `json:"listen"`
	// Backlog is how many connections may wait to be accepted; the kernel
	// takes net.core.somaxconn where that is less. 0: 4096.
	Backlog int `json:"backlog,omitempty"`
	// Mode is that of a Unix socket's file, octal. "": 0666 less the umask.
	Mode string `json:"mode,omitempty"`
	// ReusePort gives each instance a socket of its own at the address
	// (SO_REUSEPORT), in place of one for all.
	ReusePort bool `json:"reuseport,omitempty"`
}

// String has all of it: http 0.0.0.0:80 (backlog 10, reuseport).
func (s Socket) String() string {
	var more []string
	if s.Backlog != 0 {
		more = append(more, "backlog "+strconv.Itoa(s.Backlog))
	}
	if s.Mode != "" {
		more = append(more, "mode "+s.Mode)
	}
	if s.ReusePort {
		more = append(more, "reuseport")
	}
	text := s.Name + " " + s.Listen
	if more != nil {
		text += " (" + strings.Join(more, ", ") + ")"
	}
	return text
}

// Address is where Listen says: network is "tcp", "udp" or "unix", and path is
// set for the last of them only.
func (s Socket) Address() (network string, addr netip.AddrPort, path string, err error) {
	if strings.HasPrefix(s.Listen, "/") {
		switch {
		case len(s.Listen) > maxSocketPath:
			err = fmt.Errorf("the path %s is longer than %d bytes, which the kernel refuses", clip(s.Listen), maxSocketPath)
		case strings.ContainsRune(s.Listen, 0):
			err = fmt.Errorf("the path %s has a NUL byte in it", clip(s.Listen))
		}
		return "unix", netip.AddrPort{}, s.Listen, err
	}
	network = "tcp"
	rest, udp := strings.CutPrefix(s.Listen, "udp://")
	if udp {
		network = "udp"
	}
	if addr, err = netip.ParseAddrPort(rest); err != nil || addr.Port() == 0 {
		return "", netip.AddrPort{}, "", fmt.Errorf("%s is no address to listen at; write 0.0.0.0:8080, [::]:8080, 127.0.0.1:8080, udp://0.0.0.0:53 or the path of a Unix socket", clip(s.Listen))
	}
	return network, addr, "", nil
}

// listenAt brings what a person wrote into the form of Socket.Listen. What it
// does not understand stays as it is and is told by validation.
func listenAt(text, cwd, home string) string {
	scheme, rest, found := strings.Cut(text, "://")
	if !found {
		if path, ok := strings.CutPrefix(text, "unix:"); ok {
			scheme, rest, found = "unix", path, true
		}
	}
	switch {
	case found && scheme == "unix":
		return absPath(cwd, rest, home)
	case found && scheme == "tcp":
		text = rest
	case found && scheme == "udp":
		return "udp://" + hostPort(rest)
	case strings.HasPrefix(text, "/"), strings.HasPrefix(text, "./"), strings.HasPrefix(text, "../"), strings.HasPrefix(text, "~/"):
		return absPath(cwd, text, home)
	}
	return hostPort(text)
}

// hostPort completes 8080, :8080, *:8080 and localhost:8080.
func hostPort(text string) string {
	if isDigits(text) {
		return "[::]:" + text
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return text
	}
	switch host {
	case "", "*":
		host = "::"
	case "localhost":
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// listenText is an address, or a port alone.
type listenText string

type remudaSocket struct {
	Name      string     `json:"name,omitempty" jsonschema_description:"Its name in LISTEN_FDNAMES. Default: the app's name."`
	Listen    listenText `json:"listen" jsonschema_description:"Where: a port (all addresses), ADDRESS:PORT, udp://ADDRESS:PORT, or the path of a Unix socket."`
	Backlog   int        `json:"backlog,omitempty" jsonschema:"minimum=0" jsonschema_description:"Connections that may wait to be accepted. Default: 4096, or what net.core.somaxconn allows."`
	Mode      octal      `json:"mode,omitempty" jsonschema_description:"Mode of a Unix socket's file, octal."`
	ReusePort bool       `json:"reuseport,omitempty" jsonschema_description:"Each instance has a socket of its own at the address (SO_REUSEPORT). Default: false, one for all."`
}

func (s *remudaSocket) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kString || n.kind == kNumber {
		s.Listen = listenText(n.text)
		return
	}
	// {sockets: [127.0.0.1:80]} comes out of the parser as a mapping of
	// 127.0.0.1 to 80.
	if n.kind == kMap && len(n.fields) == 1 && n.fields[0].val.kind == kNumber && (n.fields[0].key == "localhost" || strings.ContainsAny(n.fields[0].key, ".:")) {
		s.Listen = listenText(n.fields[0].key + ":" + n.fields[0].val.text)
		return
	}
	d.into(n, s, what)
	if n.kind == kMap && n.get("listen") == nil {
		d.on(n, "%s has no listen; write where, for example listen: 0.0.0.0:8080", what)
	}
}

// remudaSockets is a list of sockets; one alone needs no list.
type remudaSockets []remudaSocket

func (l *remudaSockets) decodeNode(d *decoder, n *node, what string) {
	if n.kind != kList {
		n = &node{kind: kList, list: []*node{n}, line: n.line, col: n.col}
	}
	for i, e := range n.list {
		var s remudaSocket
		d.decode(e, reflect.ValueOf(&s), fmt.Sprintf("%s[%d]", what, i))
		*l = append(*l, s)
	}
}

// socketsSchema describes what remudaSockets reads.
func socketsSchema() *jsonschema.Schema {
	short := func() []*jsonschema.Schema {
		return []*jsonschema.Schema{
			{Type: "string", Examples: []any{"0.0.0.0:8080", "[::]:8080", "udp://0.0.0.0:53", "/run/web.sock"}},
			{Type: "integer", Minimum: "1", Maximum: "65535"},
		}
	}
	r := jsonschema.Reflector{Anonymous: true, ExpandedStruct: true, DoNotReference: true, Mapper: schemaOf}
	one := r.Reflect(&remudaSocket{})
	one.Version, one.Required = "", []string{"listen"}
	return &jsonschema.Schema{OneOf: append(short(), one,
		&jsonschema.Schema{Type: "array", Items: &jsonschema.Schema{OneOf: append(short(), one)}})}
}

func (l *remudaLoader) sockets(a *App, list remudaSockets) {
	for _, r := range list {
		s := Socket{Name: r.Name, Listen: listenAt(string(r.Listen), a.Cwd, l.home()), Backlog: r.Backlog, Mode: string(r.Mode), ReusePort: r.ReusePort}
		if s.Name == "" {
			s.Name = strings.ReplaceAll(a.Name, ":", "_")
		}
		a.Sockets = append(a.Sockets, s)
	}
}

// sockets checks those of an app, and its mode of execution with them.
func (v *validator) sockets(a *App) {
	if a.ExecMode == "cluster" && !a.Clustered() {
		v.add("exec_mode", "exec_mode: cluster is Node's and needs a command that begins with node, not %s; any other program shares a port by sockets: [0.0.0.0:8080], or by opening it itself with SO_REUSEPORT, and exec_mode: fork", clip(filepath.Base(firstOf(a.Command))))
	}
	v.check(!a.Sticky || a.Clustered(), "sticky", "sticky: is for Node programs in exec_mode: cluster")
	v.check(len(a.Sockets) == 0 || !a.Clustered(), "sockets", "sockets: a Node program in cluster mode shares its ports without; remove sockets:, or write exec_mode: fork and have the program listen({fd: 3})")
	v.check(len(a.Sockets) <= maxSockets, "sockets", "sockets: there are %d; the most is %d", len(a.Sockets), maxSockets)
	seen := map[string]bool{}
	for _, s := range a.Sockets {
		network, _, _, err := s.Address()
		if err != nil {
			v.add("sockets", "sockets: %v", err)
			continue
		}
		v.check(!seen[s.Listen], "sockets", "sockets: %s is there twice", clip(s.Listen))
		seen[s.Listen] = true
		v.check(s.Name != "" && len(s.Name) <= 255 && !strings.ContainsFunc(s.Name, func(r rune) bool { return r == ':' || !unicode.IsPrint(r) }),
			"sockets", "sockets: the name %s must be 1 to 255 characters that can be printed, and no colon", clip(s.Name))
		v.check(s.Backlog >= 0 && s.Backlog <= maxBacklog, "sockets", "sockets: backlog %d is not from 0 to %d", s.Backlog, maxBacklog)
		if s.Mode != "" {
			m, err := strconv.ParseUint(s.Mode, 8, 32)
			v.check(err == nil && m <= 0o777, "sockets", `sockets: mode %s is not octal digits such as "0660"`, clip(s.Mode))
			v.check(network == "unix", "sockets", "sockets: %s is no Unix socket and has no mode", clip(s.Listen))
		}
		v.check(!s.ReusePort || network != "unix", "sockets", "sockets: %s: there is no reuseport for Unix sockets", clip(s.Listen))
	}
}

func firstOf(words []string) string {
	if len(words) == 0 {
		return ""
	}
	return words[0]
}

// Clustered reports whether the instances share their sockets by Node's
// cluster module: exec_mode is cluster and Node runs the program.
func (a *App) Clustered() bool { return a.ExecMode == "cluster" && IsNode(a.Interpreter) }

// IsNode reports whether an interpreter is Node: node, nodejs, node20.
func IsNode(interpreter string) bool {
	base := strings.TrimRight(filepath.Base(interpreter), "0123456789.")
	return base == "node" || base == "nodejs"
}
