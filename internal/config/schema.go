package config

import (
	"encoding/json"
	"fmt"
	"reflect"

	"github.com/invopop/jsonschema"
)

// envKey is every env_NAME but env_file, without the lookahead that not all
// validators have.
const envKey = `^env_([^f].*|f([^i].*)?|fi([^l].*)?|fil([^e].*)?|file.+)$`

// Schema is the JSON Schema of remuda.yaml, for editors. It comes from the
// structs the file is decoded into.
func Schema() ([]byte, error) {
	r := jsonschema.Reflector{
		Anonymous:                  true,
		DoNotReference:             false,
		ExpandedStruct:             true,
		RequiredFromJSONSchemaTags: true,
		Mapper:                     schemaOf,
		Namer:                      schemaName,
	}
	s := r.Reflect(&remudaFile{})
	s.ID = "https://remuda.dev/schema/remuda.schema.json"
	s.Title = "remuda.yaml"
	s.Description = "Apps for Remuda to run. Values may have ${NAME} and ${NAME:-default}, replaced from the caller's environment and .env files; $$ is one $."
	s.AnyOf = []*jsonschema.Schema{{Required: []string{"apps"}}, {Required: []string{"pools"}}}
	s.PatternProperties = map[string]*jsonschema.Schema{"^x-": jsonschema.TrueSchema}
	// What may be written in a shorter way than its mapping.
	short := func(name string, forms ...*jsonschema.Schema) error {
		def, ok := s.Definitions[name]
		if !ok {
			return fmt.Errorf("schema: there is no definition %s", name)
		}
		s.Definitions[name] = &jsonschema.Schema{OneOf: append([]*jsonschema.Schema{def}, forms...)}
		return nil
	}
	if app, ok := s.Definitions["App"]; ok {
		app.Required = []string{"run"}
		app.PatternProperties = map[string]*jsonschema.Schema{envKey: schemaOf(reflect.TypeFor[envMap]())}
	}
	str := func() *jsonschema.Schema { return &jsonschema.Schema{Type: "string"} }
	list := func() *jsonschema.Schema { return &jsonschema.Schema{Type: "array", Items: scalarSchema()} }
	if pool, ok := s.Definitions["Pool"]; ok {
		pool.Required = []string{"run"}
		pool.PatternProperties = map[string]*jsonschema.Schema{envKey: schemaOf(reflect.TypeFor[envMap]())}
	}
	for name, forms := range map[string][]*jsonschema.Schema{
		"App":     {str(), list()},
		"Pool":    {str(), list()},
		"Breaker": {{Type: "boolean"}},
		"Cache":   {{Type: "boolean"}},
		"Restart": {{Type: "string", Enum: []any{"always", "on-failure", "never"}}},
		"Backoff": {{Const: false}},
		"Stop":    {str()},
		"Ready":   {{Type: "string", Enum: []any{"ipc", "notify", "none"}}},
		"Watch":   {{Type: "boolean"}, str(), list()},
	} {
		if err := short(name, forms...); err != nil {
			return nil, err
		}
	}
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("schema: %w", err)
	}
	return append(out, '\n'), nil
}

func schemaName(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[remudaApp]():
		return "App"
	case reflect.TypeFor[remudaPool]():
		return "Pool"
	case reflect.TypeFor[remudaBreaker]():
		return "Breaker"
	case reflect.TypeFor[remudaCache]():
		return "Cache"
	case reflect.TypeFor[remudaGroup]():
		return "Group"
	case reflect.TypeFor[remudaLogs]():
		return "Logs"
	case reflect.TypeFor[remudaRestart]():
		return "Restart"
	case reflect.TypeFor[remudaBackoff]():
		return "Backoff"
	case reflect.TypeFor[remudaStop]():
		return "Stop"
	case reflect.TypeFor[remudaReady]():
		return "Ready"
	case reflect.TypeFor[remudaWatch]():
		return "Watch"
	case reflect.TypeFor[envFile]():
		return "EnvFile"
	}
	return t.Name()
}

func scalarSchema() *jsonschema.Schema {
	return &jsonschema.Schema{OneOf: []*jsonschema.Schema{{Type: "string"}, {Type: "number"}, {Type: "boolean"}}}
}

// schemaOf describes the types whose form in the file is not their form in Go.
func schemaOf(t reflect.Type) *jsonschema.Schema {
	one := func(s ...*jsonschema.Schema) *jsonschema.Schema { return &jsonschema.Schema{OneOf: s} }
	str := &jsonschema.Schema{Type: "string"}
	list := &jsonschema.Schema{Type: "array", Items: scalarSchema()}
	switch t {
	case reflect.TypeFor[Duration]():
		return one(&jsonschema.Schema{Type: "string", Examples: []any{"500ms", "1.5s", "2m"}}, &jsonschema.Schema{Type: "number", Minimum: "0", Description: "Milliseconds."})
	case reflect.TypeFor[byteSize]():
		return one(&jsonschema.Schema{Type: "string", Examples: []any{"300M", "1.5GB"}}, &jsonschema.Schema{Type: "number", Minimum: "0", Description: "Bytes."})
	case reflect.TypeFor[share]():
		return one(&jsonschema.Schema{Type: "string", Examples: []any{"50%"}}, &jsonschema.Schema{Type: "number", Minimum: "0", Maximum: "1"})
	case reflect.TypeFor[instances](), reflect.TypeFor[id](), reflect.TypeFor[octal](), reflect.TypeFor[listenText](), reflect.TypeFor[tcpTarget](), reflect.TypeFor[surge]():
		return one(str, &jsonschema.Schema{Type: "integer"})
	case reflect.TypeFor[words](), reflect.TypeFor[stringList]():
		return one(str, list)
	case reflect.TypeFor[timeFormat]():
		return one(str, &jsonschema.Schema{Type: "boolean"})
	case reflect.TypeFor[remudaSockets]():
		return socketsSchema()
	case reflect.TypeFor[exitCodes]():
		code := &jsonschema.Schema{Type: "integer", Minimum: "0", Maximum: "255"}
		return one(code, &jsonschema.Schema{Type: "array", Items: code})
	case reflect.TypeFor[envMap]():
		return one(&jsonschema.Schema{Type: "object", AdditionalProperties: scalarSchema()}, &jsonschema.Schema{Type: "array", Items: str})
	case reflect.TypeFor[dependencies]():
		condition := &jsonschema.Schema{OneOf: []*jsonschema.Schema{{Type: "string", Enum: []any{"started", "ready", "completed"}}, {Type: "null"}}}
		return one(str, &jsonschema.Schema{Type: "array", Items: str}, &jsonschema.Schema{Type: "object", AdditionalProperties: condition})
	case reflect.TypeFor[envFiles]():
		no := &jsonschema.Schema{Type: "object", Required: []string{"path"}, AdditionalProperties: jsonschema.FalseSchema, Properties: jsonschema.NewProperties()}
		no.Properties.Set("path", str)
		no.Properties.Set("required", &jsonschema.Schema{Type: "boolean"})
		return one(str, no, &jsonschema.Schema{Type: "array", Items: one(str, no)})
	}
	return nil
}
