// Package jsondepth bounds how deep JSON from outside nests before a decoder
// that recurses is let near it.
//
// It allocates nothing, accepts anything, and must never import a package of
// Remuda.
package jsondepth

// Exceeds reports whether the arrays and objects of b nest deeper than limit.
// b need not be JSON.
func Exceeds(b []byte, limit int) bool {
	depth, inString := 0, false
	for i := 0; i < len(b); i++ {
		switch ch := b[i]; {
		case inString && ch == '\\':
			i++
		case ch == '"':
			inString = !inString
		case inString:
		case ch == '{' || ch == '[':
			if depth++; depth > limit {
				return true
			}
		case ch == '}' || ch == ']':
			depth--
		}
	}
	return false
}
