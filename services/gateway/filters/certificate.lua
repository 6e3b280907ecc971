-- Says who a client is by its certificate, which TLS has verified: the last part of its SPIFFE ID, or else its common
-- name, or else its first DNS name. Runs before keys are looked at, and only where clients may have certificates.
-- A request that brings a key as well is the key's.

local function acceptable(name)
  return name ~= nil and #name > 0 and #name <= 64 and not name:find("[^%w%._%-]")
end

local function named(ssl)
  for _, uri in ipairs(ssl:uriSanPeerCertificate()) do
    local name = uri:match("^spiffe://[^/]+/.*([^/]+)$") and uri:match("([^/]+)$")
    if acceptable(name) then return name end
  end
  local subject = ssl:parsedSubjectPeerCertificate()
  local name = subject and subject:commonName()
  if acceptable(name) then return name end
  for _, dns in ipairs(ssl:dnsSansPeerCertificate()) do
    if acceptable(dns) then return dns end
  end
end

function envoy_on_request(h)
  if h:headers():get("authorization") then return end
  local ssl = h:streamInfo():downstreamSslConnection()
  if ssl == nil or not ssl:peerCertificatePresented() or not ssl:peerCertificateValidated() then return end
  local name = named(ssl)
  if name then h:headers():replace("x-lingqu-certificate", name) end
end
