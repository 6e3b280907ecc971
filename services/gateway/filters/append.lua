-- Appends fields to every message of a request: the last occurrence of a field wins.

local function varint(number)
  local out = ""
  while number >= 128 do
    out = out .. string.char(number % 128 + 128)
    number = math.floor(number / 128)
  end
  return out .. string.char(number)
end

-- A field of text.
local function field(number, text)
  return string.char(number * 8 + 2) .. varint(#text) .. text
end

-- Length prefix of a gRPC message (1 byte of flags, 4 of length).
local function prefix(flags, length)
  return string.char(flags, math.floor(length / 16777216) % 256, math.floor(length / 65536) % 256,
                     math.floor(length / 256) % 256, length % 256)
end

local function append_to_one(h, suffix)
  local body = h:body(true)
  local size = body:length()
  if size < 5 then return end
  local bytes = body:getBytes(0, size)
  local a, b, c, d = bytes:byte(2, 5)
  local length = ((a * 256 + b) * 256 + c) * 256 + d
  if size ~= length + 5 then return end
  body:setBytes(prefix(bytes:byte(1), length + #suffix) .. bytes:sub(6) .. suffix)
end

-- The same for a stream: messages may be split over chunks anywhere.
local function append_to_all(h, suffix)
  local head, left = "", 0
  for chunk in h:bodyChunks() do
    local size = chunk:length()
    local bytes = size > 0 and chunk:getBytes(0, size) or ""
    local out, at = {}, 1
    while at <= #bytes do
      if left == 0 then
        local take = math.min(5 - #head, #bytes - at + 1)
        head = head .. bytes:sub(at, at + take - 1)
        at = at + take
        if #head == 5 then
          local flags, a, b, c, d = head:byte(1, 5)
          left = ((a * 256 + b) * 256 + c) * 256 + d
          out[#out + 1] = prefix(flags, left + #suffix)
          head = ""
          if left == 0 then out[#out + 1] = suffix end
        end
      else
        local take = math.min(left, #bytes - at + 1)
        out[#out + 1] = bytes:sub(at, at + take - 1)
        at, left = at + take, left - take
        if left == 0 then out[#out + 1] = suffix end
      end
    end
    if size > 0 then chunk:setBytes(table.concat(out)) end
  end
end

local function append(h, suffix)
  if h:headers():get(":path"):find("ModelStreamInfer", 1, true) then
    append_to_all(h, suffix)
  else
    append_to_one(h, suffix)
  end
end
