package cluster

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"

	"github.com/remuda-dev/remuda/internal/nodeipc"
)

// Node's own commands that matter here.
const (
	cmdCluster = "NODE_CLUSTER"
	cmdHandle  = "NODE_HANDLE"
	cmdAck     = "NODE_HANDLE_ACK"
	cmdNack    = "NODE_HANDLE_NACK"
)

// fields are the members of a message by their exact names: encoding/json
// would take "CMD" for "cmd" in a struct, and Node does not.
type fields map[string]json.RawMessage

// decode checks that b is one JSON value. cmd and the fields are set where it
// is one of Node's own messages.
func decode(b []byte) (cmd string, f fields, err error) {
	if !json.Valid(b) { // which bounds the depth too
		return "", nil, fmt.Errorf("%w: not JSON: %.64q", nodeipc.ErrMalformed, b)
	}
	b = bytes.TrimLeft(b, " \t\r\n")
	// An escape could spell "cmd" in another way.
	if b[0] != '{' || !bytes.Contains(b, []byte(`"cmd"`)) && bytes.IndexByte(b, '\\') < 0 {
		return "", nil, nil
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return "", nil, fmt.Errorf("%w: %w", nodeipc.ErrMalformed, err)
	}
	if cmd = f.text("cmd"); len(cmd) > len("NODE_") && cmd[:len("NODE_")] == "NODE_" {
		return cmd, f, nil
	}
	return "", nil, nil
}

// text is a string member, "" where there is none.
func (f fields) text(name string) string {
	var s string
	if raw := f[name]; len(raw) > 0 && raw[0] == '"' && json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// number is a whole number that JavaScript can count with, or none where the
// member is anything else.
func (f fields) number(name string, none int64) int64 {
	v, err := strconv.ParseFloat(string(f[name]), 64)
	if err != nil || v != math.Trunc(v) || math.Abs(v) > 1<<53 {
		return none
	}
	return int64(v)
}

// query is what a worker asks a socket for.
type query struct {
	address     string // "": any
	port        int
	addressType string // "4", "6", "-1", "udp4", "udp6"
	fd          int    // -1: none
	flags       int
	backlog     int
	index       int // tells several servers of one address apart
	data        json.RawMessage
}

func (f fields) query() query {
	q := query{
		address:     f.text("address"),
		port:        small(f.number("port", 0)),
		addressType: f.text("addressType"),
		fd:          small(f.number("fd", -1)),
		flags:       small(f.number("flags", 0)),
		backlog:     small(f.number("backlog", 0)),
		index:       small(f.number("index", 0)),
		data:        f["data"],
	}
	if q.addressType == "" {
		q.addressType = strconv.FormatInt(f.number("addressType", 0), 10)
	}
	return q
}

// small keeps what no socket call takes out of reach.
func small(n int64) int {
	return int(min(max(n, math.MinInt32), math.MaxInt32))
}

// key names the listener, for the worker and for the store.
func (q *query) key() string {
	return fmt.Sprintf("%s:%d:%s:%d:%d", q.address, q.port, q.addressType, q.fd, q.index)
}

func (q *query) udp() bool { return q.addressType == "udp4" || q.addressType == "udp6" }

// reply answers a queryServer.
type reply struct {
	Cmd      string          `json:"cmd"`
	Ack      int64           `json:"ack"`
	Seq      int64           `json:"seq"`
	Key      string          `json:"key,omitempty"`
	Errno    int             `json:"errno"`
	Data     json.RawMessage `json:"data"`
	Sockname *sockname       `json:"sockname,omitempty"`
}

// sockname is the address of a socket that only the primary has.
type sockname struct {
	Address string `json:"address"`
	Family  string `json:"family"`
	Port    int    `json:"port"`
}

// order is what the primary says by itself.
type order struct {
	Cmd string `json:"cmd"`
	Act string `json:"act,omitempty"`
	Ack *int64 `json:"ack,omitempty"`
	Key string `json:"key,omitempty"`
	Seq int64  `json:"seq"`
}

// withHandle wraps a message that carries a descriptor.
type withHandle struct {
	Cmd  string `json:"cmd"`
	Type string `json:"type"`
	Msg  any    `json:"msg"`
}
