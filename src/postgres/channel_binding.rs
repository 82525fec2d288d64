//! `tls-server-end-point`: the hash of the server's certificate that ties a SCRAM login to its TLS connection (RFC 5929 §4).
//!
//! Pure function. Input: the certificate as DER. Output: the digest by the hash of the certificate's own signature
//! algorithm, SHA-256 standing in for MD5 and SHA-1. Where the RFC defines nothing (Ed25519, RSA-PSS here), there is
//! none, and SCRAM runs without binding.

use ring::digest;

/// The binding data for `certificate`, if its signature algorithm is one the RFC has a hash for.
pub fn tls_server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let algorithm = match signature_algorithm(certificate)? {
        // 1.2.840.113549.1.1.x: RSA with MD5, SHA-1, SHA-256, SHA-384, SHA-512.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, hash] => match hash {
            4 | 5 | 11 => &digest::SHA256,
            12 => &digest::SHA384,
            13 => &digest::SHA512,
            _ => return None,
        },
        // 1.2.840.10045.4.1 and .3.x: ECDSA with SHA-1, SHA-256, SHA-384, SHA-512.
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 2] => &digest::SHA256,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 3] => &digest::SHA384,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 4] => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(algorithm, certificate).as_ref().to_vec())
}

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;

/// `Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OID, … }, … }` (RFC 5280 §4.1).
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (_, after_tbs) = element(certificate, SEQUENCE)?;
    let (algorithm, _) = element(after_tbs, SEQUENCE)?;
    let (oid, _) = element(algorithm, OBJECT_IDENTIFIER)?;
    Some(oid)
}

/// Takes one DER element with `tag` off the front: its content and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    if found != tag {
        return None;
    }
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        // The long form: the low bits count the bytes of the length; four are more than any certificate needs.
        let count = usize::from(first & 0x7f);
        if count == 0 || count > 4 {
            return None;
        }
        let (bytes, rest) = rest.split_at_checked(count)?;
        let length = bytes
            .iter()
            .fold(0, |length, &byte| length << 8 | usize::from(byte));
        (length, rest)
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn certificate(oid: &[u8]) -> Vec<u8> {
        let mut algorithm = vec![OBJECT_IDENTIFIER, u8::try_from(oid.len()).unwrap()];
        algorithm.extend_from_slice(oid);
        let mut body = vec![SEQUENCE, 0x82, 0x01, 0x00];
        body.extend_from_slice(&[7; 256]);
        body.extend_from_slice(&[SEQUENCE, u8::try_from(algorithm.len()).unwrap()]);
        body.extend_from_slice(&algorithm);
        body.extend_from_slice(&[0x03, 0x01, 0x00]);
        let mut der = vec![SEQUENCE, 0x82];
        der.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
        der.extend_from_slice(&body);
        der
    }

    #[test]
    fn hashes_by_the_signature_algorithm() {
        let rsa = |last| vec![0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, last];
        let ecdsa = |last| vec![0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, last];
        for (oid, bytes) in [
            (rsa(5), Some(32)),
            (rsa(11), Some(32)),
            (rsa(12), Some(48)),
            (rsa(13), Some(64)),
            (rsa(10), None),
            (ecdsa(2), Some(32)),
            (ecdsa(3), Some(48)),
            (ecdsa(4), Some(64)),
            (vec![0x2b, 0x65, 0x70], None),
        ] {
            let binding = tls_server_end_point(&certificate(&oid));
            assert_eq!(binding.map(|binding| binding.len()), bytes, "{oid:x?}");
        }
    }

    #[test]
    fn never_panics_on_a_broken_certificate() {
        let whole = certificate(&[0x2a]);
        for end in 0..whole.len() {
            assert_eq!(tls_server_end_point(&whole[..end]), None);
        }
        assert_eq!(tls_server_end_point(&[0x30, 0xff, 0xff]), None);
        assert_eq!(
            tls_server_end_point(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0]),
            None
        );
    }
}
