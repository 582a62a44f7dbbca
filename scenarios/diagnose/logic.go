package diagnose

// truth is that of a statement about counters of which some may be missing:
// Kleene's three values.
type truth int8

const (
	unknown truth = iota
	no
	yes
)

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

func not(t truth) truth {
	switch t {
	case yes:
		return no
	case no:
		return yes
	}
	return unknown
}

// all is no if one is no, and yes if each is yes.
func all(statements ...truth) truth {
	result := yes
	for _, t := range statements {
		switch t {
		case no:
			return no
		case unknown:
			result = unknown
		}
	}
	return result
}

// some is yes if one is yes, and no if each is no.
func some(statements ...truth) truth {
	result := no
	for _, t := range statements {
		switch t {
		case yes:
			return yes
		case unknown:
			result = unknown
		}
	}
	return result
}

// number is a value that may be missing. It is a float64 because products of
// counters must not overflow; counters are exact in it up to 2^53.
type number struct {
	value float64
	known bool
}

func of(v float64) number { return number{v, true} }

func (a number) plus(b number) number  { return number{a.value + b.value, a.known && b.known} }
func (a number) minus(b number) number { return number{a.value - b.value, a.known && b.known} }
func (a number) times(k float64) number {
	return number{a.value * k, a.known}
}

// atMost is the smaller of the two.
func (a number) atMost(b number) number {
	return number{min(a.value, b.value), a.known && b.known}
}

// exceeds is a > b.
func (a number) exceeds(b number) truth {
	if !a.known || !b.known {
		return unknown
	}
	return truthOf(a.value > b.value)
}

// reaches is a ≥ b.
func (a number) reaches(b number) truth {
	if !a.known || !b.known {
		return unknown
	}
	return truthOf(a.value >= b.value)
}

// positive is a > 0, none is a = 0 (or less, which no counter is).
func (a number) positive() truth { return a.exceeds(of(0)) }
func (a number) none() truth     { return of(0).reaches(a) }
