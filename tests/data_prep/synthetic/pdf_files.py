"""PDF files for tests, written object by object."""

FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def write_pdf(objects):
    """A PDF file of numbered objects, the first of which is the catalogue."""
    out, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + end


def stream(content, entries=b""):
    return b"<< %s /Length %d >>\nstream\n%s\nendstream" % (entries, len(content), content)


def one_page(content, form=b"", page=b"", size=(600, 800), meaning=b""):
    """A page with the font /F1, the graphics state /Faint (opacity 3%) and the form /X, moved by (100, 50).

    `meaning` gives the font's characters other code points, such as b"<66> <d835dc65>" for "f".
    """
    cmap = b"1 begincodespacerange <00> <ff> endcodespacerange 1 beginbfchar %s endbfchar"
    cmap %= meaning or b"<66> <0066>"
    box = b"[0 0 %d %d]" % size
    entries = b"/Type /XObject /Subtype /Form /Matrix [1 0 0 1 100 50] /BBox %s %s"
    resources = b"/Resources << /Font << /F1 3 0 R >> /ExtGState << /Faint << /ca 0.03 /CA 0.03 >> >> %s >>"
    return write_pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [4 0 R] /Count 1 >>",
            FONT[:-2] + b"/ToUnicode 7 0 R >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox %s %s /Contents 5 0 R %s >>"
            % (box, page, resources % b"/XObject << /X 6 0 R >>"),
            stream(content),
            stream(form, entries % (box, resources % b"")),
            stream(b"/CIDInit /ProcSet findresource begin begincmap " + cmap + b" endcmap end"),
        ]
    )


def words(x, y, text, before=b"", size=16):
    """Operators that show a text at (x, y), after others that set its look."""
    return b"q %s BT /F1 %g Tf %d %d Td (%s) Tj ET Q\n" % (before, size, x, y, text)
